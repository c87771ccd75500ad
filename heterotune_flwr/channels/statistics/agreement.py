"""Which types' classes lie where the others' do (numpy only)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.statistics.class_pool import Classes, pooled

#: A type is judged by so many classes in common with the others, and so many examples of them per label of the task.
_IN_COMMON, _JUDGED = 3, 2
Matrix = NDArray[np.float64]


def agreement(one: Classes, other: Classes, metric: Matrix) -> float | None:
    """Cosine, under the metric, of where two sides' classes lie from their own middle; None where it says nothing.

    Over the classes that both have told of, each by ``w_c = n_c n'_c / (n_c + n'_c)``: the middle is the mean of a
    side's class means with these weights, so that neither other classes, nor how often one occurs, nor where all of a
    side's texts lie makes a difference. It says nothing of fewer than three classes in common, or few examples of them.
    """
    shared = (one.counts > 0) & (other.counts > 0)
    counts = [side.counts[shared] for side in (one, other)]
    enough = _JUDGED * len(shared)
    if shared.sum() < _IN_COMMON or min(float(side.sum()) for side in counts) < enough:
        return None
    weights = (counts[0] * counts[1] / (counts[0] + counts[1]))[:, None]
    sides = []
    for side, own in zip((one, other), counts, strict=True):
        means = side.sums[shared] / own[:, None]
        sides.append(means - (weights * means).sum(axis=0) / weights.sum())
    left, right = sides
    lengths = [float((weights * side * metric * side).sum()) for side in sides]
    if min(lengths) <= 0:
        return None
    return float((weights * left * metric * right).sum()) / math.sqrt(lengths[0] * lengths[1])


def who_agrees(
    totals: Mapping[str, Classes], metric: Matrix, limit: float
) -> tuple[dict[str, float], frozenset[str]]:
    """How well every type agrees with the others, and those that agree less than ``limit``.

    The type that agrees least is taken out first, and the others are compared anew; it keeps the number it went with.
    Of two that are left and disagree nobody knows which is right: both are taken out. A type of which nothing can be
    said stays.
    """
    found: dict[str, float] = {}
    members = sorted(totals)
    while len(members) > 1:
        now: dict[str, float] = {}
        for key in members:
            others = pooled(totals[other] for other in members if other != key)
            assert others is not None
            if (value := agreement(totals[key], others, metric)) is not None:
                now[key] = value
        found |= now
        worst = min(now, key=lambda key: now[key], default=None)
        if worst is None or now[worst] >= limit:
            break
        members = [] if len(members) == 2 else [key for key in members if key != worst]
    return found, frozenset(totals) - frozenset(members)
