"""What safetensors headers say about a backbone without reading its weights (no torch here)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.backbones.sources import EMBEDDED, FETCHABLE
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.jsons import parse_json

_INDEX = "model.safetensors.index.json"
#: A header is a few hundred kB even of the largest models; a damaged length would claim anything.
_LONGEST = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """Name, stored type (``BF16``, ``F32`` ...) and shape of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(directory: Path) -> list[Path]:
    """Weight files of a backbone in order (ValueError for an unreadable index of shards)."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / _INDEX).exists():
        raise ValueError("there is no model.safetensors (nor shards with an index)")
    try:
        names = set(parse_json((directory / _INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_INDEX} is not readable ({error})") from error
    if any(Path(str(name)).name != name for name in names):
        raise ValueError(f"{_INDEX} names a file that is not beside it")
    return [directory / str(name) for name in sorted(names)]


def _parsed(raw: bytes, path: Path) -> Any:
    try:
        return parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path.name} has a damaged header") from error


def read_header(path: Path) -> list[TensorHeader]:
    """Tensors of one safetensors file.

    Raises ValueError: the file is missing, shorter or longer than its header says, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST):
                raise ValueError(f"{path.name} is truncated or no safetensors file ({size} bytes)")
            raw = stream.read(length)
        header = _parsed(raw, path)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = [
            TensorHeader(name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        ]
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path.name} has a damaged header") from error
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, its header promises {8 + length + end}")
    return tensors


def mend_hint(source: str) -> str:
    """What to do about a damaged backbone."""
    if source in EMBEDDED:
        return "install heterotune-flwr again"
    if source in FETCHABLE:
        return f"run: heterotune backbones fetch {source}"
    return "copy or download it again"


def tensor_headers(source: str, directory: Path) -> list[TensorHeader]:
    """All tensors of a backbone, after checking that its weights are as long as they should be.

    ``source`` is its name in a configuration, for the error.

    Raises BackboneError: a weight file is missing, truncated or damaged.
    """
    try:
        return [tensor for path in weight_files(directory) for tensor in read_header(path)]
    except ValueError as error:
        raise BackboneError(
            f"backbone {source!r} is damaged: {error} in {directory}; {mend_hint(source)}"
        ) from error


def damaged_json(directory: Path) -> str | None:
    """Name of the first JSON file of a directory that is not JSON, None if all are."""
    for path in sorted(directory.glob("*.json")):
        try:
            parse_json(path.read_text())
        except (OSError, ValueError):
            return path.name
    return None
