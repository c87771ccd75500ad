"""The learning rate inside a round, as clients take it and as the server reckons with it. No torch here."""

from __future__ import annotations

import functools
import math


def sinking_share(done: float) -> float:
    """Share of the rate after a share ``done`` of the way, 1 to 0 as half a cosine (arXiv 1608.03983)."""
    return (1 + math.cos(math.pi * done)) / 2


def warm_up_share(done: int, warm: float) -> float:
    """Share of the rate in the step after ``done`` steps, of which the first ``warm`` warm up."""
    return min(1.0, (done + 1) / max(warm, 1.0))


@functools.lru_cache(maxsize=256)  # asked several times for each of thousands of updates
def path_length(steps: int, learning_rate: float, warmup_ratio: float) -> float:
    """Sum of a round's learning rates: what turns a pseudo-gradient back into a change of weights."""
    warm = warmup_ratio * steps
    return learning_rate * sum(warm_up_share(done, warm) for done in range(steps))
