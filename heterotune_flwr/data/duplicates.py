"""Texts that are the same but for case, spaces and punctuation, or nearly the same."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.seeds import generator

#: Share of letter sequences that two texts have in common from which on they are nearly the same.
NEARLY = 0.7
#: Letters of a sequence.
_LETTERS = 5
#: MinHash (Broder 1997) in bands: texts that share a whole band are compared exactly.
_BANDS, _ROWS = 16, 4
_PRIME = np.uint64(2**31 - 1)


def folded(text: str) -> str:
    """A text without what does not make another one of it: case, spaces, punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


class Seen:
    """Texts in which one looks for others that are nearly the same."""

    def __init__(self) -> None:
        rng = generator(0, "duplicates")
        count = _BANDS * _ROWS
        self._factors = rng.integers(1, 2**31 - 1, size=(count, 1), dtype=np.uint64)
        self._shifts = rng.integers(0, 2**31 - 1, size=(count, 1), dtype=np.uint64)
        self._same: dict[str, int] = {}
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._texts: list[frozenset[int]] = []

    def add(self, text: str) -> None:
        """Remember a text."""
        same = folded(text)
        if same in self._same:
            return
        self._same[same] = len(self._texts)
        for band in self._hashed(pieces := _pieces(same)):
            self._bands[band].append(len(self._texts))
        self._texts.append(pieces)

    def same(self, text: str) -> bool:
        """Whether a text was added that is equal when both are folded."""
        return folded(text) in self._same

    def near(self, text: str) -> bool:
        """Whether a text was added that is the same or nearly so."""
        same = folded(text)
        if same in self._same:
            return True
        pieces = _pieces(same)
        found = {place for band in self._hashed(pieces) for place in self._bands.get(band, ())}
        return any(_share(pieces, self._texts[place]) >= NEARLY for place in sorted(found))

    def _hashed(self, pieces: frozenset[int]) -> list[tuple[int, bytes]]:
        values: NDArray[np.uint64] = (
            np.fromiter(pieces, dtype=np.uint64, count=len(pieces)) % _PRIME
        )
        least = (
            ((self._factors * values + self._shifts) % _PRIME).min(axis=1).reshape(_BANDS, _ROWS)
        )
        return [(band, row.tobytes()) for band, row in enumerate(least)]


def _pieces(text: str) -> frozenset[int]:
    """Every sequence of letters, as a number."""
    ends = range(max(len(text) - _LETTERS + 1, 1))
    return frozenset(zlib.crc32(text[i : i + _LETTERS].encode()) for i in ends)


def _share(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
