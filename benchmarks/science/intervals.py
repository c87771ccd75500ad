"""Intervals of a mean over seeds and texts, both of which are draws: other clients, other test texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def two_way_interval(gains: NDArray[Any], level: float = 0.95) -> dict[str, float]:
    """Mean of ``gains`` (seeds x texts) with a Student interval over both: {"gain", "low", "high"}.

    A gain is a seed's part, a text's part and the rest. The variance of the mean is that of the seeds' means plus that
    of the texts' means, less the rest, which is in both (the random model of two crossed factors, Searle, Casella &
    McCulloch 1992); degrees of freedom are Satterthwaite's. One column: texts are not told apart, and the interval is
    over seeds alone.

    Raises ValueError: fewer than two seeds.
    """
    values = np.asarray(gains, np.float64)
    seeds, texts = values.shape
    if seeds < 2:
        raise ValueError("an interval over seeds needs at least two")
    mean = float(values.mean())
    by_seed, by_text = values.mean(axis=1), values.mean(axis=0)
    parts = [(float(by_seed.var(ddof=1)) / seeds, seeds - 1)]
    rest = 0.0
    if texts > 1:
        parts.append((float(by_text.var(ddof=1)) / texts, texts - 1))
        left = values - by_seed[:, None] - by_text + mean
        rest = float((left**2).sum()) / ((seeds - 1) * (texts - 1)) / (seeds * texts)
    total = sum(part for part, _ in parts)
    variance = max([total - rest, *(part for part, _ in parts)])
    freedom = total**2 / sum(part**2 / df for part, df in parts) if total else seeds - 1
    width = float(stats.t.ppf(0.5 + level / 2, freedom)) * variance**0.5
    return {"gain": mean, "low": mean - width, "high": mean + width}


def surely_worse(ours: NDArray[np.bool_], other: NDArray[np.bool_], level: float = 0.05) -> int:
    """How many clients (rows) are worse than the other, text by text: McNemar's exact test, one-sided, by Holm."""
    lost, won = (other & ~ours).sum(axis=1), (ours & ~other).sum(axis=1)
    chances = sorted(
        float(stats.binomtest(int(a), int(a + b), 0.5, "greater").pvalue) if a + b else 1.0
        for a, b in zip(lost, won, strict=True)
    )
    for place, chance in enumerate(chances):
        if chance > level / (len(chances) - place):
            return place
    return len(chances)
