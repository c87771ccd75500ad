"""Blocks of 64 numbers with one scale each: 8 or 4 bits a number, and 16 bits per block.

Every tensor begins a block of its own, so what arrives of a tensor does not depend on its neighbours in the record.
A record is all scales (bfloat16, in block order), then all codes in the order of the numbers:

* ``int8``: one signed byte, ``round(127 x / s)``, read as ``s c / 127``;
* ``nf4``: four bits, the lower half of a byte first; an index into the 16 quantiles of a normal distribution of QLoRA
  (arXiv 2305.14314, appendix E), nearest to ``x / s``.

``s`` is the block's largest magnitude, rounded to bfloat16: a float16 scale would turn blocks of changes below 6e-8
into zeros. A block with a number that is not finite has the scale NaN and arrives as NaN throughout; one without a
normal float32 (all below 1.2e-38) arrives as zeros.

Only what the writer writes is read: its scale is the block's largest magnitude, so some code of a block is extreme, and
a block of zeros or NaN has neutral codes. A record that breaks this is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.halves import NAN, from_bf16, to_bf16

#: Numbers per scale.
BLOCK = 64

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int16]

_SMALLEST, _LARGEST = 0x0080, 0x7F7F  # bfloat16 bits of the normal numbers
_QUANTILES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]
)  # fmt: skip
_MIDDLES = (_QUANTILES[1:] + _QUANTILES[:-1]) / 2
_ZERO = 7  # where the quantiles have their zero


@dataclass(frozen=True)
class Scheme:
    """How a number relative to its block's scale is coded.

    Attributes
    ----------
    bits
        Per code.
    code, value
        Number from -1 to 1 -> code, and back.
    extreme
        Which codes stand for -1 and 1.
    neutral
        The code of zero.

    """

    bits: int
    code: Callable[[NDArray[np.float64]], Codes]
    value: Callable[[Codes], NDArray[np.float64]]
    extreme: Callable[[Codes], NDArray[np.bool_]]
    neutral: int


INT8 = Scheme(
    8,
    lambda x: np.rint(np.clip(x, -1.0, 1.0) * 127.0).astype(np.int16),
    lambda codes: codes / 127.0,
    lambda codes: np.abs(codes) == 127,
    0,
)
NF4 = Scheme(
    4,
    lambda x: np.searchsorted(_MIDDLES, x).astype(np.int16),
    lambda codes: _QUANTILES[codes],
    lambda codes: (codes == 0) | (codes == len(_QUANTILES) - 1),
    _ZERO,
)


def _blocks(sizes: Sequence[int]) -> int:
    return sum(-(-size // BLOCK) for size in sizes)


def _starts(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where blocks begin; the end of the last one is not among them."""
    begins = np.cumsum([0, *sizes])
    parts = [np.arange(b, b + size, BLOCK) for b, size in zip(begins, sizes, strict=False)]
    return np.concatenate([*parts, np.zeros(0, dtype=np.int64)]).astype(np.int64)


def _per_number(
    scales: NDArray[np.float64], starts: NDArray[np.int64], total: int
) -> NDArray[np.float64]:
    return np.repeat(scales, np.diff(starts, append=total))


def length(scheme: Scheme) -> Callable[[Sequence[int]], int]:
    """Sizes of tensors -> bytes."""

    def count(sizes: Sequence[int]) -> int:
        return 2 * _blocks(sizes) + -(-sum(sizes) * scheme.bits // 8)

    return count


def _scales(peaks: Floats) -> NDArray[np.uint16]:
    """The blocks' largest magnitudes as bfloat16: normal, zero, or the one NaN."""
    bits = np.minimum(to_bf16(peaks), np.uint16(_LARGEST))
    bits = np.where(bits < _SMALLEST, np.uint16(0), bits)
    return np.where(np.isfinite(peaks), bits, np.uint16(NAN)).astype("<u2")


def _pack(codes: Codes, bits: int) -> Bytes:
    if bits == 8:
        return codes.astype(np.int8).view(np.uint8)
    even = np.zeros(len(codes) + len(codes) % 2, dtype=np.uint8)
    even[: len(codes)] = codes
    return np.asarray(even[0::2] | (even[1::2] << np.uint8(4)), dtype=np.uint8)


def _unpack(packed: Bytes, bits: int, total: int) -> Codes:
    if bits == 8:
        return packed.view(np.int8).astype(np.int16)
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1).reshape(-1)
    if pairs[total:].any():
        raise ExchangeError("packed numbers end in half a byte that is not empty")
    return pairs[:total].astype(np.int16)


def coders(
    scheme: Scheme,
) -> tuple[Callable[[Floats, Sequence[int]], Bytes], Callable[[Bytes, Sequence[int]], Floats]]:
    """``write`` and ``read`` of a scheme."""

    def write(values: Floats, sizes: Sequence[int]) -> Bytes:
        starts = _starts(sizes)
        if not len(starts):
            return np.zeros(0, dtype=np.uint8)
        scales = _scales(np.maximum.reduceat(np.abs(values), starts))
        usable = (scales != 0) & (scales != NAN)
        steps = np.where(usable, from_bf16(np.where(usable, scales, 0x3F80)), np.inf)
        kept = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
        codes = scheme.code(kept / _per_number(steps.astype(np.float64), starts, len(values)))
        return np.concatenate([scales.view(np.uint8), _pack(codes, scheme.bits)])

    def read(data: Bytes, sizes: Sequence[int]) -> Floats:
        starts, total = _starts(sizes), sum(sizes)
        if not len(starts):
            return np.zeros(0, dtype=np.float32)
        head = 2 * len(starts)
        bits = np.frombuffer(data[:head].tobytes(), dtype="<u2")
        codes = _unpack(data[head:], scheme.bits, total)
        check_codes(scheme, bits, codes, starts)
        scales = from_bf16(bits).astype(np.float64)
        return (scheme.value(codes) * _per_number(scales, starts, total)).astype(np.float32)

    return write, read


def check_codes(
    scheme: Scheme, scales: NDArray[np.uint16], codes: Codes, starts: NDArray[np.int64]
) -> None:
    """Refuse scales and codes that this writer never makes (ExchangeError)."""
    empty = (scales == 0) | (scales == NAN)
    if not (empty | ((scales >= _SMALLEST) & (scales <= _LARGEST))).all():
        raise ExchangeError("a block's scale is negative, infinite or too small")
    if scheme.bits == 8 and codes.min() < -127:
        raise ExchangeError("a code is below -127")
    extreme = np.logical_or.reduceat(scheme.extreme(codes), starts)
    neutral = np.logical_and.reduceat(codes == scheme.neutral, starts)
    if not np.where(empty, neutral, extreme).all():
        raise ExchangeError("the codes of a block do not fit its scale")
