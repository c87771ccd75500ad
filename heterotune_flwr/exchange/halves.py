"""bfloat16 without a dtype for it: the upper half of a float32's bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: The one not-a-number that is written.
NAN = 0x7FC0


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16 (nearest, ties to even); NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype("<u2")
    # Adding the rounding term may carry a NaN's mantissa over into infinity or zero.
    return np.where(np.isnan(values), np.uint16(NAN), upper).astype("<u2")


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers that bfloat16 bits stand for, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
