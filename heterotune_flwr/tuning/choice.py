"""Which model a client keeps of its bare one, the one trained alone, and the federated one: do no harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.protocol.metrics import BARE, FEDERATED
from heterotune_flwr.tuning.evaluate import ExampleResults
from heterotune_flwr.tuning.kept_model import Choosing, Measured

#: By example.
Scores = NDArray[np.float64]
#: With fewer examples there is no standard error, so nothing to choose by.
FEWEST = 2


def choose(
    results: Mapping[str, ExampleResults], score: Callable[[str], Scores | None]
) -> tuple[str, Choosing]:
    """The model a client takes, and what that was decided by.

    The lowest mean loss wins among the models that may take the bare one's place: better by more than a standard error
    of the paired difference, in loss or in score, and not worse by as much in the other. Where there is none, the bare
    model stays.

    Parameters
    ----------
    results
        By model, the bare one among them, on the same examples (at least :data:`FEWEST`).
    score
        What each answer of a model is worth (right or not, ROUGE-L), None where that is not measured; not asked of a
        model whose loss is worse.

    """
    bare = results[BARE]
    found = {name: (each.loss, _error(each.losses - bare.losses)) for name, each in results.items()}
    scores: dict[str, Scores | None] = {}
    took = BARE
    for name in sorted(results, key=lambda name: found[name][0]):
        loss, error = found[name]
        gain = bare.loss - loss
        if name == BARE or not gain >= -error:
            continue
        scores |= {each: score(each) for each in (BARE, name) if each not in scores}
        difference = _difference(scores[name], scores[BARE])
        more, doubt = float(difference.mean()), _error(difference)
        if more >= -doubt and (gain > error or more > doubt):
            took = name
            break
    models = {name: Measured(*pair, _mean(scores.get(name))) for name, pair in found.items()}
    return took, Choosing(len(bare.losses), models)


def without_choice(examples: int) -> tuple[str, Choosing]:
    """With too few examples to choose by: a client has what it took part for, the federated model."""
    return FEDERATED, Choosing(examples, {})


def _difference(ours: Scores | None, others: Scores | None) -> Scores:
    """Paired differences; zeros where scores are not measured, or too few for a standard error."""
    if ours is None or others is None or len(ours) < FEWEST:
        return np.zeros(FEWEST)
    return ours - others


def _error(differences: NDArray[np.float64]) -> float:
    """Standard error of a mean of paired differences."""
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))


def _mean(scores: Scores | None) -> float | None:
    return None if scores is None else float(scores.mean())
