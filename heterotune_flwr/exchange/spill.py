"""Many updates without the memory of all of them: the first in memory, the rest in a file, bit for bit the same.

The updates of ten thousand clients are more than a gigabyte. A mean needs each once, a robust mean, a median of lengths
and a refusal need them again: so they are kept as float32 in a file of the run directory that no name leads to (it is
gone with the process), and read when they are asked for.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.exchange.packing import Tensors

#: Bytes of updates of one round that stay in memory.
IN_MEMORY = 32_000_000
Layout = dict[str, tuple[int, tuple[int, ...]]]


class Stored(Mapping[str, NDArray[np.float32]]):
    """An update's tensors in a file, by name, in their order; each access reads them anew.

    Attributes
    ----------
    norm, fingerprint
        What the gate asks of it, worked out when it was stored; None of a part of an update.

    """

    def __init__(
        self,
        file: BinaryIO,
        layout: Layout,
        norm: float | None = None,
        fingerprint: str | None = None,
        scale: np.float32 | None = None,
    ) -> None:
        self._file, self._layout, self._scale = file, layout, scale
        self.norm, self.fingerprint = norm, fingerprint

    def __iter__(self) -> Iterator[str]:
        """Names, in the update's order."""
        return iter(self._layout)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._layout)

    def __contains__(self, name: object) -> bool:
        """Whether it has a tensor, without reading it."""
        return name in self._layout

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """Read one tensor."""
        return Stored(self._file, {name: self._layout[name]}, scale=self._scale).load()[name]

    @functools.cached_property
    def size(self) -> int:
        """Count the numbers of all tensors."""
        return sum(math.prod(shape) for _, shape in self._layout.values())

    def _read(self) -> tuple[int, NDArray[np.float32]]:
        """Where the first tensor begins in the file, and all numbers from there to the end of the last."""
        ends = [start + 4 * math.prod(shape) for start, shape in self._layout.values()]
        first = min((start for start, _ in self._layout.values()), default=0)
        wanted = max(ends, default=0) - first
        data = os.pread(self._file.fileno(), wanted, first)
        if len(data) != wanted:
            raise OSError("updates that were put aside cannot be read back")
        values = np.frombuffer(data, dtype=np.float32)
        return first, values if self._scale is None else self._scale * values

    def load(self) -> Tensors:
        """Read all tensors at once."""
        first, values = self._read()
        return {
            name: values[(start - first) // 4 :][: math.prod(shape)].reshape(shape)
            for name, (start, shape) in self._layout.items()
        }

    def flat(self) -> NDArray[np.float32]:
        """Read all tensors one after the other as one vector."""
        expected = next((start for start, _ in self._layout.values()), 0)
        for start, shape in self._layout.values():
            if start != expected:  # a part, or another order
                return np.concatenate([value.reshape(-1) for value in self.load().values()])
            expected += 4 * math.prod(shape)
        return self._read()[1]

    def only(self, names: Iterable[str]) -> Stored:
        """Some of the tensors, unread."""
        return Stored(self._file, {name: self._layout[name] for name in names}, scale=self._scale)

    def scaled(self, scale: np.float32) -> Stored:
        """All tensors times a number, unread."""
        return Stored(self._file, self._layout, scale=scale)


def loaded(tensors: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
    """Return the tensors in memory."""
    return tensors.load() if isinstance(tensors, Stored) else tensors


class Spill:
    """Where one round's updates are kept.

    A file of ``directory`` is made when :data:`IN_MEMORY` is passed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held = 0
        self._file: BinaryIO | None = None
        self._end = 0

    def takes(self, size: int) -> bool:
        """Take down an update of so many numbers; whether it belongs into the file (:meth:`put`)."""
        self._held += 4 * size
        return self._held > IN_MEMORY

    def put(
        self, tensors: Mapping[str, NDArray[np.float32]], norm: float, fingerprint: str
    ) -> Stored:
        """Write an update (OSError: the disk is full)."""
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory, prefix=".updates-")  # noqa: SIM115
        layout: Layout = {}
        parts = []
        for name, value in tensors.items():
            layout[name] = (self._end, value.shape)
            parts.append(np.ascontiguousarray(value, dtype=np.float32).tobytes())
            self._end += len(parts[-1])
        self._file.write(b"".join(parts))
        self._file.flush()
        return Stored(self._file, layout, norm, fingerprint)
