"""What a run directory keeps of its alignment: the maps of every type so far, and what a later type's are fitted to.

A resumed run must go on in the same latent space, so maps that are here are never computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.align import AlignmentResult
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.schema import MethodConfig


@dataclass(frozen=True)
class KeptMaps:
    """Maps of all types that have taken part, whoever is there now.

    Attributes
    ----------
    tensors, quality, fingerprints
        Type -> its maps as clients hold them, its held-out canonical correlation per slot, its weights' identity.
    shrinkage, latents
        Of the first alignment (:class:`.AlignmentResult`); latents are empty in directories of older programs.

    """

    tensors: dict[str, Tensors]
    quality: dict[str, list[float]]
    fingerprints: dict[str, str]
    shrinkage: list[float]
    latents: dict[str, NDArray[Any]]

    @staticmethod
    def path(directory: Path, method: MethodConfig, seed: int) -> Path:
        """The file of one method's and seed's maps."""
        text = json.dumps([dataclasses.asdict(method), seed], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return directory / "maps" / f"{name}.safetensors"

    @classmethod
    def load(cls, path: Path) -> KeptMaps | None:
        """Read a file, None where there is none (ExchangeError: it is damaged)."""
        if not path.exists():
            return None
        state = load_state(path)
        return cls(
            state["tensors"],
            state["quality"],
            state["fingerprints"],
            state.get("shrinkage", []),
            state.get("latents", {}),
        )

    def save(self, path: Path) -> None:
        """Write the file."""
        save_state(
            path, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        )

    def of(self, type_keys: Iterable[str]) -> tuple[dict[str, Tensors], dict[str, list[float]]]:
        """Maps and quality of some types."""
        keys = list(type_keys)
        return {k: self.tensors[k] for k in keys}, {k: self.quality[k] for k in keys}

    def with_type(
        self, type_key: str, maps: Tensors, quality: list[float], fingerprint: str
    ) -> KeptMaps:
        """These and one more."""
        return dataclasses.replace(
            self,
            tensors={**self.tensors, type_key: maps},
            quality={**self.quality, type_key: quality},
            fingerprints={**self.fingerprints, type_key: fingerprint},
        )

    def known(self, symbols: NDArray[np.bool_] | None = None) -> AlignmentResult:
        """What a later type joins that knows, of the symbols, these; None: all."""
        latents = dict(self.latents)
        if "functionals" in latents and symbols is not None:
            latents["functionals"] = latents["functionals"][symbols]
        return AlignmentResult(self.tensors, self.quality, self.shrinkage, 0, latents)
