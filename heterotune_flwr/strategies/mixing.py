"""What of the shared bank still crosses types in the personalization phase: a little of the mean over types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.exchange.packing import Tensors

#: How far from the last shared bank a type may be that is mixed into the others', in medians over types.
_FARTHEST = 2.0


def mean_over(banks: Sequence[Tensors], name: str) -> NDArray[np.float32]:
    """Mean of one tensor."""
    values = np.stack([bank[name] for bank in banks])
    return np.asarray(values.mean(axis=0, dtype=np.float64), np.float32)


def mix(names: Sequence[str], shared: Tensors, banks: Sequence[Tensors], share: float) -> None:
    """Move some tensors of every type's bank by ``share`` towards the mean over types, in place.

    A type that has gone far more from the last ``shared`` bank than the others counts as far as :data:`_FARTHEST` lets
    it.
    """
    moved = [{n: bank[n] - shared[n] for n in names} for bank in banks]
    lengths = [np.sqrt(sum(float(np.square(v).sum()) for v in own.values())) for own in moved]
    farthest = _FARTHEST * float(np.median(lengths))
    scales = [min(1.0, farthest / length) if length > 0 else 1.0 for length in lengths]
    for name in names:
        steps = [scale * own[name] for scale, own in zip(scales, moved, strict=True)]
        mean = shared[name] + np.mean(steps, axis=0)
        for bank in banks:
            bank[name] = ((1 - share) * bank[name] + share * mean).astype(np.float32)
