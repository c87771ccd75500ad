"""Which model a client keeps of its bare one, the one trained alone, and the federated one: do no harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from heterotune_flwr.protocol.metrics import BARE, FEDERATED
from heterotune_flwr.tuning.evaluate import ExampleResults
from heterotune_flwr.tuning.kept_model import Choosing, Measured

#: With fewer examples there is no standard error, so nothing to choose by.
FEWEST = 2


def choose(
    results: Mapping[str, ExampleResults], measure: Callable[[str], float | None]
) -> tuple[str, Choosing]:
    """The model a client takes, and what that was decided by.

    The lowest mean loss wins among the models that may take the bare one's place: those whose paired loss is lower by
    more than a standard error, and whose ``measure`` is not lower. Where there is none, the bare model stays.

    Parameters
    ----------
    results
        By model, the bare one among them, on the same examples (at least :data:`FEWEST`).
    measure
        Accuracy or ROUGE-L of a model on them, None where neither is taken; asked of as few models as can be.

    """
    bare = results[BARE]
    found = {name: (each.loss, _error(each, bare)) for name, each in results.items()}
    taken: dict[str, float | None] = {}
    took = BARE
    for name in sorted(results, key=lambda name: found[name][0]):
        loss, error = found[name]
        if name == BARE or not bare.loss - loss > error:
            continue
        taken |= {each: measure(each) for each in (BARE, name) if each not in taken}
        ours, least = taken[name], taken[BARE]
        if ours is None or least is None or ours >= least:
            took = name
            break
    models = {name: Measured(*pair, taken.get(name)) for name, pair in found.items()}
    return took, Choosing(len(bare.losses), models)


def without_choice(examples: int) -> tuple[str, Choosing]:
    """With too few examples to choose by: a client has what it took part for, the federated model."""
    return FEDERATED, Choosing(examples, {})


def _error(results: ExampleResults, bare: ExampleResults) -> float:
    """Standard error of the mean paired difference in loss."""
    differences = results.losses - bare.losses
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))
