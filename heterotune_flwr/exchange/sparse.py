"""The largest numbers of a record alone: ``topk``.

Of ``n`` numbers ``k = ceil(share n)`` travel: their positions in the record, rising, two bytes each (four where ``n``
is above 65536), then their values as bfloat16 in the same order. The rest arrives as zero. Numbers that are not
finite count as larger than all others, equal ones by position; the choice is made after rounding, so that what arrives
would be chosen again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.halves import from_bf16, to_bf16

#: The smallest share.
LEAST = 0.001
_MILLION = 1_000_000

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Sizes = Sequence[int]


def kept(total: int, share: float) -> int:
    """How many of ``total`` numbers travel: in whole numbers, the same on every machine."""
    return -(-total * round(share * _MILLION) // _MILLION)


def _position_type(total: int) -> np.dtype[Any]:
    return np.dtype("<u2" if total <= 1 << 16 else "<u4")


def _largest(bits: NDArray[np.uint16], count: int) -> NDArray[np.int64]:
    """Positions of the ``count`` largest magnitudes, rising; equal ones from the left."""
    magnitudes = bits & np.uint16(0x7FFF)  # of bfloat16 bits in the order of the numbers, NaN last
    threshold = np.partition(magnitudes, len(bits) - count)[len(bits) - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def coders(
    share: float,
) -> tuple[
    Callable[[Sizes], int], Callable[[Floats, Sizes], Bytes], Callable[[Bytes, Sizes], Floats]
]:
    """``length``, ``write`` and ``read`` for a share."""

    def length(sizes: Sizes) -> int:
        total = sum(sizes)
        return kept(total, share) * (_position_type(total).itemsize + 2)

    def write(values: Floats, sizes: Sizes) -> Bytes:
        count = kept(len(values), share)
        if not count:
            return np.zeros(0, dtype=np.uint8)
        bits = to_bf16(values)
        chosen = _largest(bits, count)
        positions = chosen.astype(_position_type(len(values)))
        return np.concatenate([positions.view(np.uint8), bits[chosen].view(np.uint8)])

    def read(data: Bytes, sizes: Sizes) -> Floats:
        total = sum(sizes)
        count, kind = kept(total, share), _position_type(total)
        split = count * kind.itemsize
        positions = np.frombuffer(data[:split].tobytes(), dtype=kind).astype(np.int64)
        if count and (positions[-1] >= total or (np.diff(positions) <= 0).any()):
            raise ExchangeError(f"positions must rise and be below {total}")
        values = np.zeros(total, dtype=np.float32)
        values[positions] = from_bf16(np.frombuffer(data[split:].tobytes(), dtype="<u2"))
        return values

    return length, write, read
