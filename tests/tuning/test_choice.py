"""Do no harm: the bare model stays unless another one is better by a standard error."""

from __future__ import annotations

import numpy as np
import pytest

from heterotune_flwr.tuning.choice import choose
from heterotune_flwr.tuning.evaluate import ExampleResults

BARE = np.array([1.0, 2.0, 3.0, 2.0])


def results(**models):
    return {
        name: ExampleResults(np.asarray(losses, float), np.zeros(len(losses), bool))
        for name, losses in {"bare": BARE, **models}.items()
    }


def took(scores=None, **models):
    found = {name: np.asarray(each, float) for name, each in (scores or {}).items()}
    return choose(results(**models), found.get)[0]


def test_the_lowest_loss_wins_where_it_is_lower_by_more_than_a_standard_error():
    assert took(alone=BARE - 0.1, federated=BARE - 0.2) == "federated"
    assert took(alone=BARE - 0.3, federated=BARE - 0.2) == "alone"
    assert took(federated=BARE + 0.1) == "bare"
    noisy = BARE - np.array([4.0, -2.0, 0.5, -1.0])  # mean gain 0.375, standard error 1.3
    assert took(federated=noisy) == "bare"
    assert took(alone=BARE - 0.1, federated=noisy) == "alone"  # sure, if smaller
    assert took(federated=BARE * np.nan) == "bare"
    assert took(alone=BARE - 0.1, federated=BARE - 0.1) == "alone"  # of equals the own one


def test_a_model_that_answers_worse_does_not_take_the_bare_ones_place():
    lower = {"alone": BARE - 0.1, "federated": BARE - 0.2}
    half, less, more = [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]
    assert took({"bare": half, "federated": less, "alone": half}, **lower) == "alone"
    assert took({"bare": half, "federated": less, "alone": less}, **lower) == "bare"
    assert took({"bare": half, "federated": half, "alone": more}, **lower) == "federated"
    one = {"bare": [1.0], "federated": [0.0], "alone": [0.0]}  # says nothing
    assert took(one, **lower) == "federated"
    doubtful = [1, 0, 0, 0]  # lower by a standard error, not by more
    assert took({"bare": half, "federated": doubtful, "alone": half}, **lower) == "federated"


def test_a_model_that_surely_answers_better_may_take_it_unless_its_loss_is_worse():
    noisy = BARE - np.array([4.0, -2.0, 0.5, -1.0])
    scores = {"bare": [0, 0, 0, 0], "alone": [1, 1, 0, 1]}
    assert took(scores, alone=noisy) == "alone"
    assert took(scores, alone=BARE + 0.1) == "bare"


def test_what_was_decided_by_is_told_and_no_model_answers_in_vain():
    asked = []
    found, choosing = choose(
        results(alone=BARE + 1, federated=BARE - np.array([0.5, 0.25, 0.5, 0.25])),
        lambda name: asked.append(name) or np.full(4, 0.5),
    )
    assert (found, choosing.examples, sorted(asked)) == ("federated", 4, ["bare", "federated"])
    bare, federated = choosing.models["bare"], choosing.models["federated"]
    assert (bare.loss, bare.error, bare.measure) == (2.0, 0.0, 0.5)
    assert federated.loss == pytest.approx(1.625)
    spread = np.std([0.5, 0.25, 0.5, 0.25], ddof=1)
    assert federated.error == pytest.approx(spread / 2)
    assert choosing.models["alone"].measure is None
