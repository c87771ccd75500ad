"""Means that a few hostile or broken clients cannot move far, inside a model type.

With ``n`` vectors of one type, ``b`` of them arbitrary:

``mean``          example-weighted mean; one client moves it anywhere
``trimmed_mean``  per number, the mean of what is left without the ``floor(trim n)`` largest and smallest (arXiv
                  1803.01498); holds while b <= trim n
``median``        per number, the median (same paper); holds while b < n / 2
``clipped_mean``  every vector shortened to ``clip`` times the (lower) median length, then their mean (after arXiv
                  1911.07963); bounds what b clients do, does not remove it
``krum``          the one vector whose n - b - 2 nearest others are nearest (arXiv 1703.02757); needs n >= 2 b + 3
``multi_krum``    the weighted mean of the ``keep`` best vectors by the same score

The first two rules after ``mean`` do not weigh by examples: a number a client reports of itself must not decide whose
values count. With two vectors or one, nothing can tell who is right, and every rule is the weighted mean. Krum's
choice is made by Flower's own implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga.pull import shares_of_length
from heterotune_flwr.fields import check_fields, option

Matrix = NDArray[np.float64]
RULES = ("mean", "trimmed_mean", "median", "clipped_mean", "krum", "multi_krum")


@dataclass(frozen=True)
class RobustMean:
    """How updates of one type are averaged; holds no state.

    Raises
    ------
    ConfigError
        An unknown rule, or a number outside its range.

    """

    rule: str = option(
        "mean", "which mean (docs/reliability.md says what each withstands)", choices=RULES
    )
    trim: float = option(0.2, "trimmed_mean: cut off at each end [share]", least=0, below=0.5)
    clip: float = option(1.0, "clipped_mean: longest update [median lengths]", above=0)
    hostile: int = option(1, "krum, multi_krum: b, how many may be hostile [clients]", least=0)
    keep: int | None = option(
        None, "multi_krum: updates kept; null: all but the hostile [updates]", least=1
    )

    def __post_init__(self) -> None:
        check_fields(self, "robust")

    def __call__(self, vectors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        """Combine vectors of one shape ``(d,)`` in float64.

        Parameters
        ----------
        vectors
            In an order that does not depend on who answered first.
        weights
            Number of examples of each, above 0.

        """
        stacked = np.stack([np.asarray(vector, np.float64) for vector in vectors])
        count = len(stacked)
        shares = np.asarray(weights, np.float64)
        if self.rule == "mean" or count <= 2:
            return _mean(stacked, shares)
        if self.rule == "median":
            return np.asarray(np.median(stacked, axis=0))
        if self.rule == "trimmed_mean":
            cut = int(self.trim * count + 1e-9)
            return np.asarray(np.sort(stacked, axis=0)[cut : count - cut].mean(axis=0))
        if self.rule == "clipped_mean":
            scales = shares_of_length(np.linalg.norm(stacked, axis=1), self.clip)
            return _mean(stacked * scales[:, None], shares)
        keep = 1 if self.rule == "krum" else (self.keep or max(count - self.hostile, 1))
        chosen = sorted(_krum(stacked, self.hostile, min(keep, count)))
        return _mean(stacked[chosen], shares[chosen])


def _mean(stacked: Matrix, weights: Matrix) -> Matrix:
    total = np.zeros(stacked.shape[1])
    for vector, weight in zip(stacked, weights / weights.sum(), strict=True):
        total += weight * vector
    return total


def _krum(stacked: Matrix, hostile: int, keep: int) -> list[int]:
    """Indices that Flower's Multi-Krum selects."""
    from heterotune_flwr.flower import Array, ArrayRecord, RecordDict, select_multikrum

    contents = [RecordDict({"arrays": ArrayRecord({"x": Array(row)})}) for row in stacked]
    selected = select_multikrum(contents, hostile, keep)
    return [next(i for i, c in enumerate(contents) if c is content) for content in selected]
