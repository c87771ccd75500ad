"""Maps that were computed before: a function of factors and settings, kept on disk under what they were made of.

``<cache>/alignment/maps/<key>.safetensors``. The key is over every number of the factors, the settings, the labels, the
seed and the code of this package, so that nothing a client claims decides what is found; a damaged file is made anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from heterotune_flwr.alignment.maps import AlignmentResult
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors, tensor_digest
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

#: Files kept, a dozen megabytes each; the least recently used go first.
_FILES = 16


@functools.cache
def _code() -> str:
    """Identity of what computes maps."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def maps_path(
    factors: Mapping[str, Tensors],
    alignment: AlignmentConfig,
    method: MethodConfig,
    labels: Sequence[str] | None,
    seed: int,
) -> Path:
    """The file of the maps that these factors give."""
    parts = [
        _code(), {key: tensor_digest(value) for key, value in factors.items()},
        dataclasses.asdict(dataclasses.replace(alignment, cache=True)), dataclasses.asdict(method),
        list(labels or []), seed,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "alignment" / "maps" / f"{key}.safetensors"


def kept_maps(path: Path, compute: Callable[[], AlignmentResult]) -> AlignmentResult:
    """Return the maps in a file, or compute them and keep them there.

    A disk that cannot be written costs time only.
    """
    try:
        state = load_state(path)
        os.utime(path)
        return AlignmentResult(**state)
    except (ExchangeError, OSError, TypeError):
        result = compute()
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    try:
        save_state(path, fields)
        files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in files[:-_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        return result
    return result
