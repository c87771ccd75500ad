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


NOISY = np.array([4.0, -2.0, 0.5, -1.0])  # mean 0.375, standard error 1.3


def test_a_model_is_left_for_one_that_is_better_by_a_standard_error():
    assert took(alone=BARE - 0.1) == "alone"
    assert took(federated=BARE - 0.1) == "federated"
    assert took(alone=BARE + 0.1, federated=BARE + 0.1) == "bare"
    assert took(alone=BARE - NOISY, federated=BARE - NOISY) == "bare"
    assert took(federated=BARE * np.nan) == "bare"


def test_the_federated_model_must_be_better_than_the_one_that_stands_so_far():
    assert took(alone=BARE - 0.1, federated=BARE - 0.2) == "federated"
    assert took(alone=BARE - 0.3, federated=BARE - 0.2) == "alone"
    assert took(alone=BARE - 0.1, federated=BARE - 0.1 - NOISY) == "alone"  # lower, not surely
    assert took(alone=BARE - 0.1, federated=BARE - 0.1) == "alone"  # of equals the own one
    assert took(alone=BARE + 5.0, federated=BARE - 0.2) == "federated"


HALF, LESS, MORE = [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]
DOUBTFUL = [1, 0, 0, 0]  # below HALF by a standard error, not by more


def test_the_model_alone_may_not_answer_surely_worse():
    lower = {"alone": BARE - 0.1}
    assert took({"bare": HALF, "alone": LESS}, **lower) == "bare"
    assert took({"bare": HALF, "alone": DOUBTFUL}, **lower) == "alone"
    assert took({"bare": [1.0], "alone": [0.0]}, **lower) == "alone"  # one answer says nothing


def test_the_federated_model_may_not_answer_worse_at_all():
    lower = {"alone": BARE - 0.1, "federated": BARE - 0.2}
    assert took({"bare": LESS, "alone": HALF, "federated": HALF}, **lower) == "federated"
    assert took({"bare": LESS, "alone": HALF, "federated": DOUBTFUL}, **lower) == "alone"
    assert took({"bare": HALF, "alone": LESS, "federated": DOUBTFUL}, **lower) == "bare"
    assert took({"bare": HALF, "alone": HALF, "federated": MORE}, **lower) == "federated"
    little = {"bare": [0.02, 0.02, 0, 0], "alone": LESS, "federated": LESS}
    assert took(little, **lower) == "alone"  # nor worse than the bare one, which was left before
    assert took(alone=BARE * np.nan, federated=BARE - 0.2) == "federated"


def test_a_model_alone_that_may_not_be_taken_bars_the_federated_one_only_if_that_is_surely_worse():
    worse = {"alone": BARE + 5.0, "federated": BARE - 0.2}
    scores = {"bare": LESS, "alone": HALF, "federated": DOUBTFUL}
    assert took(scores, **worse) == "federated"
    assert took({**scores, "federated": LESS}, **worse) == "bare"
    assert took({**scores, "bare": HALF}, **worse) == "bare"  # than the bare one never worse
    doubtful = {**worse, "alone": BARE + NOISY}  # not barred, and not taken either
    assert took({**scores, "bare": DOUBTFUL}, **doubtful) == "bare"
    near = {"alone": BARE - 0.1, "federated": BARE - np.array([0.2, 0.0, 0.1, 0.06])}
    by_score = {"bare": HALF, "alone": LESS, "federated": MORE}
    assert took(by_score, **near) == "federated"
    assert took({**by_score, "alone": HALF}, **near) == "alone"  # nothing bars that one
    assert took(by_score, **{**near, "federated": BARE - 0.05}) == "bare"


def test_a_model_that_surely_answers_better_is_taken_unless_its_loss_is_worse():
    scores = {"bare": LESS, "alone": [1, 1, 0, 1]}
    assert took(scores, alone=BARE - NOISY) == "alone"
    assert took(scores, alone=BARE + NOISY) == "alone"  # higher, not surely
    assert took(scores, alone=BARE + 0.1) == "bare"
    shared = {"bare": LESS, "federated": [1, 1, 0, 1]}
    assert took(shared, federated=BARE - NOISY) == "federated"
    assert took(shared, federated=BARE + NOISY) == "bare"


def test_scores_next_to_nothing_keep_nobody_from_training_alone():
    nothing = {"bare": [0.01, 0.01, 0.02, 0.02], "alone": LESS, "federated": LESS}
    assert took(nothing, alone=BARE - 0.1) == "alone"
    assert took(nothing, alone=BARE + 0.1) == "bare"
    assert took(nothing, federated=BARE - 0.1) == "bare"
    something = {"bare": [0.1, 0.1, 0.2, 0.2], "alone": LESS}
    assert took(something, alone=BARE - 0.1) == "bare"


def test_what_was_decided_by_is_told_and_no_model_answers_in_vain():
    asked = []
    found, choosing = choose(
        results(alone=BARE - np.array([0.5, 0.25, 0.5, 0.25]), federated=BARE + 1),
        lambda name: asked.append(name) or np.full(4, 0.5),
    )
    assert (found, choosing.examples, sorted(asked)) == ("alone", 4, ["alone", "bare"])
    bare, alone = choosing.models["bare"], choosing.models["alone"]
    assert (bare.loss, bare.error, bare.measure) == (2.0, 0.0, 0.5)
    assert alone.loss == pytest.approx(1.625)
    spread = np.std([0.5, 0.25, 0.5, 0.25], ddof=1)
    assert alone.error == pytest.approx(spread / 2)
    assert choosing.models["federated"].measure is None
