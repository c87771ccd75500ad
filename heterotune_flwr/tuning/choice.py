"""Which model a client keeps of its bare one, the one trained alone, and the federated one: do no harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.protocol.metrics import ALONE, BARE, FEDERATED
from heterotune_flwr.tuning.evaluate import ExampleResults
from heterotune_flwr.tuning.kept_model import Choosing, Measured

#: By example.
Scores = NDArray[np.float64]
#: With fewer examples there is no standard error, so nothing to choose by.
FEWEST = 2
#: Mean scores below it (0 to 1) are next to nothing: they keep nobody from a lower loss.
NEAR_ZERO = 0.05


def choose(
    results: Mapping[str, ExampleResults], score: Callable[[str], Scores | None]
) -> tuple[str, Choosing]:
    """The model a client takes, and what that was decided by.

    It begins at the bare one, and goes to the one trained alone, then to the federated one, where that is better than
    the one so far by more than a standard error of the paired difference, in loss or in score. The one alone may not be
    worse by as much in the other. The federated one may be no worse in either than any other, surely or not; than one
    alone that is barred by the bare model it may not be surely worse.

    Parameters
    ----------
    results
        By model, the bare one among them, on the same examples (at least :data:`FEWEST`).
    score
        What each answer of a model is worth (right or not, ROUGE-L), None where that is not measured; not asked of a
        model whose loss is worse.

    """
    scores: dict[str, Scores | None] = {}

    def lower(name: str, other: str) -> Scores:
        return results[other].losses - results[name].losses

    def higher(name: str, other: str) -> Scores:
        scores.update({each: score(each) for each in (name, other) if each not in scores})
        return _difference(scores[name], scores[other])

    took, barred = BARE, ""
    known = [name for name in results if np.isfinite(results[name].loss)]
    if ALONE in known:
        gains = [lower(ALONE, BARE)]
        if not _sure(-gains[0]):
            gains.append(higher(ALONE, BARE))
            if all((_mean(scores[name]) or 0.0) < NEAR_ZERO for name in (ALONE, BARE)):
                gains.pop()
        if any(_sure(-gain) for gain in gains):
            barred = ALONE
        elif any(map(_sure, gains)):
            took = ALONE
    others = [name for name in known if name != FEDERATED]

    def allows(other: str, gain: Scores) -> bool:
        return not _sure(-gain) if other == barred else bool(gain.mean() >= 0)

    if (
        FEDERATED in known
        and all(allows(other, lower(FEDERATED, other)) for other in others)
        and all(allows(other, higher(FEDERATED, other)) for other in others)
        and (_sure(lower(FEDERATED, took)) or _sure(higher(FEDERATED, took)))
    ):
        took = FEDERATED
    bare = results[BARE].losses
    models = {
        name: Measured(each.loss, _error(each.losses - bare), _mean(scores.get(name)))
        for name, each in results.items()
    }
    return took, Choosing(len(bare), models)


def without_choice(examples: int) -> tuple[str, Choosing]:
    """With too few examples to choose by: a client has what it took part for, the federated model."""
    return FEDERATED, Choosing(examples, {})


def _difference(ours: Scores | None, others: Scores | None) -> Scores:
    """Paired differences; zeros where scores are not measured, or too few for a standard error."""
    if ours is None or others is None or len(ours) < FEWEST:
        return np.zeros(FEWEST)
    return ours - others


def _sure(gains: NDArray[np.float64]) -> bool:
    """Whether their mean is above zero by more than a standard error."""
    return bool(gains.mean() > _error(gains))


def _error(differences: NDArray[np.float64]) -> float:
    """Standard error of a mean of paired differences."""
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))


def _mean(scores: Scores | None) -> float | None:
    return None if scores is None else float(scores.mean())
