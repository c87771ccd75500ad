"""The manifest of a packed record: which tensors it holds, of which shapes, written by which codec.

ASCII JSON without spaces, ``{"format":2,"codec":"bf16","tensors":[["name",[2,3]],...]}``, names in rising order.
There is one way to write each manifest, and no other is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.jsons import parse_json

#: Version of the record's format. 1 was the same without the number and with bf16, fp16 and fp32 alone.
FORMAT = 2
#: Limits of any record, whatever is expected: numbers (4 GiB in float32), tensors, dimensions, bytes of text.
MAX_NUMBERS = 1 << 30
_MAX_TENSORS, _MAX_DIMENSIONS, _MAX_BYTES = 1 << 16, 8, 1 << 20
#: Without expected shapes, numbers a record may announce for every byte it brings. One bit a number makes 8.
_MOST_PER_BYTE = 16

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What the receiver knows of a record before reading it.

    Attributes
    ----------
    shapes
        Names that may occur, and the shapes they must have; None: any.
    codecs
        Codecs it may be written with; None: any.

    """

    shapes: Mapping[str, Shape] | None = None
    codecs: Collection[str] | None = None


@dataclass(frozen=True)
class Manifest:
    """A codec's name, and (name, shape) of every tensor in rising order of names."""

    codec: str
    tensors: tuple[tuple[str, Shape], ...]

    @property
    def sizes(self) -> list[int]:
        """Numbers of every tensor."""
        return [math.prod(shape) for _, shape in self.tensors]

    def to_bytes(self) -> bytes:
        """The one way to write it."""
        tensors = [[name, list(shape)] for name, shape in self.tensors]
        content = {"format": FORMAT, "codec": self.codec, "tensors": tensors}
        return json.dumps(content, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read and check a manifest.

        Raises ExchangeError: it is not JSON, of another format, or not exactly as :meth:`to_bytes` writes it.
        """
        if len(raw) > _MAX_BYTES:
            raise ExchangeError(f"the manifest has {len(raw)} bytes, more than {_MAX_BYTES}")
        try:
            content: Any = parse_json(raw.decode("ascii"))
        except ValueError as error:
            reason = str(error)[:80]
            raise ExchangeError(f"the manifest of packed tensors is malformed: {reason}") from error
        if not isinstance(content, dict) or "tensors" not in content:
            raise ExchangeError("the manifest of packed tensors is malformed: it lists no tensors")
        version = content.get("format", 1)
        if type(version) is not int or version != FORMAT:
            shown = version if type(version) is int and abs(version) < 1 << 30 else "unknown"
            raise ExchangeError(
                f"the record has format {shown}, this side reads format {FORMAT}; install the same "
                "heterotune-flwr on the server and on every client"
            )
        codec = content.get("codec")
        if not isinstance(codec, str):
            raise ExchangeError("the manifest of packed tensors names no codec")
        manifest = cls(codec, _tensors(content["tensors"]))
        if manifest.to_bytes() != raw:
            raise ExchangeError("the manifest of packed tensors is malformed: not in its one form")
        return manifest

    def check(self, expected: Expected, data_bytes: int) -> None:
        """Refuse what is not expected, before anything of the announced size is allocated.

        Raises ExchangeError: another codec, an unexpected tensor or shape, or more numbers than the bytes received can
        stand for.
        """
        if expected.codecs is not None and self.codec not in expected.codecs:
            allowed = ", ".join(sorted(expected.codecs))
            raise ExchangeError(f"sends codec {self.codec[:40]!r}, this run expects {allowed}")
        total = sum(self.sizes)
        if expected.shapes is None:
            if total > min(_MOST_PER_BYTE * data_bytes, MAX_NUMBERS):
                raise ExchangeError(f"{total} numbers are announced for {data_bytes} bytes")
            return
        for name, shape in self.tensors:
            if name not in expected.shapes:
                raise ExchangeError(f"brings the unexpected tensor {name[:80]!r}")
            if shape != tuple(expected.shapes[name]):
                wanted = list(expected.shapes[name])
                raise ExchangeError(f"sends {name} as {list(shape)}, expected {wanted}")


def _tensors(entries: Any) -> tuple[tuple[str, Shape], ...]:
    if not isinstance(entries, list) or len(entries) > _MAX_TENSORS:
        raise ExchangeError(f"the manifest must list at most {_MAX_TENSORS} tensors")
    tensors: list[tuple[str, Shape]] = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise ExchangeError("the manifest lists something that is no [name, shape]")
        name, shape = entry
        _check_name(name)
        if tensors and not tensors[-1][0] < name:
            raise ExchangeError(f"the manifest names {name[:80]!r} twice or out of order")
        _check_shape(name, shape)
        tensors.append((name, tuple(shape)))
    return tuple(tensors)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 500:
        raise ExchangeError("the manifest names a tensor with no text of 1 to 500 letters")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise ExchangeError("the manifest names a tensor with half a letter (a lone surrogate)")


def _check_shape(name: str, shape: Any) -> None:
    fine = (
        isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_NUMBERS for size in shape)
        and math.prod(size or 1 for size in shape) <= MAX_NUMBERS
    )
    if not fine:
        raise ExchangeError(f"tensor {name[:80]!r} has an impossible shape")
