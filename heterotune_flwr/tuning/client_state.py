"""What a client keeps between rounds: its own tensors, and the frozen maps of its type.

Files, not memory: virtual clients share worker processes, and a deployed client is a new process
for every message. ``<state dir>/clients/<experiment>/<client id>.safetensors`` and
``<state dir>/maps/<digest>.safetensors`` (content-addressed, shared by the clients of a type).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.exchange.storage import load_tensors, save_tensors

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+#-]{0,199}")

Tensors = dict[str, NDArray[np.float32]]


def _checked(name: str, what: str) -> str:
    """Refuse names that could leave the state directory: they come over the network."""
    if not _NAME.fullmatch(name):
        raise ExchangeError(f"{what} {name!r} cannot name a file; use letters, digits, - and _")
    return name


class ClientStore:
    """The files of one client under a state directory."""

    def __init__(self, state_dir: Path, experiment: str, client_id: str) -> None:
        self._state_dir = state_dir
        folder = state_dir / "clients" / _checked(experiment, "experiment")
        self.path = folder / f"{_checked(client_id, 'client id')}.safetensors"

    def load(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Own tensors of the names and shapes wanted; empty before the first training.

        Raises
        ------
        ExchangeError
            The file is there but damaged, or has a tensor of another shape.

        """
        if not self.path.exists():
            return {}
        held = load_tensors(self.path)
        own = {name: held[name] for name in shapes if name in held}
        for name, value in own.items():
            if value.shape != tuple(shapes[name]):
                raise ExchangeError(
                    f"{self.path} holds {name!r} of shape {value.shape}, expected {shapes[name]}: "
                    "it belongs to another configuration; remove it or change run.state_dir"
                )
        return own

    def save(self, tensors: Mapping[str, NDArray[np.float32]], round: int) -> None:
        """Replace the client's own tensors, atomically."""
        save_tensors(self.path, tensors, {"round": str(round)})

    def _maps_path(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ExchangeError(f"maps digest {digest!r} is not a SHA-256")
        return self._state_dir / "maps" / f"{digest}.safetensors"

    def save_maps(self, maps: Mapping[str, NDArray[np.float32]], digest: str) -> None:
        """Keep maps under their digest.

        Raises
        ------
        ExchangeError
            The maps are not those the digest names.

        """
        path = self._maps_path(digest)
        if tensor_digest(maps) != digest:
            raise ExchangeError("the maps received are not those their digest names")
        if not path.exists():
            save_tensors(path, maps)

    def load_maps(self, digest: str) -> Tensors | None:
        """Maps by digest, None when this client does not have them (whole)."""
        path = self._maps_path(digest)
        if not path.exists():
            return None
        maps = load_tensors(path)
        return maps if tensor_digest(maps) == digest else None
