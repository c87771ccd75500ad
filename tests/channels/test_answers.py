"""Answers in words on public anchors: drawn by clients, weighed and drawn again by the server, learnt by all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from facts import opened, run_facts, texts
from hypothesis import example, given
from hypothesis import strategies as st

from heterotune_flwr.channels.answers.server import bags, balance_answers
from heterotune_flwr.channels.predictions.record import (
    LONGEST_ANSWER,
    DistillationRequest,
    Said,
    as_answers,
)
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.payloads import add_payloads, read_payloads

# ------------------------------------------------------------------------------------ the server


def ensemble_of(tmp_path, anchors=20, **options):
    """Ten clients of type ``a`` and two of type ``b`` that answer so many anchors."""
    types = {f"c{n}": "a" for n in range(10)} | {"b0": "b", "b1": "b"}
    path = texts(tmp_path / "anchors.txt", anchors)
    facts = run_facts(types, path, labels=[], seed=5)
    return opened("answers", facts, anchors=anchors, pool=anchors, **options)


def said(answers, sure=1.0):
    sureness = np.broadcast_to(np.asarray(sure, np.float32).reshape(-1, 1), (len(answers), 1))
    return Said(sureness, list(answers)).to_payload()


def drawn(ensemble, round, type_key="a"):
    return ensemble.round_request(round, type_key).answers


def test_what_is_drawn_follows_the_clients_weights(tmp_path):
    plain = {"agreement_power": 0.0, "balance": 0}
    replies = {"c0": said(["web"] * 3000, 1.0), "c1": said(["games"] * 3000, 0.5)}
    for power, share in ((2.0, 0.8), (0.0, 0.5)):  # 1 : 0.5^2, or alike
        ensemble = ensemble_of(tmp_path, 3000, entropy_power=power, **plain)
        found = ensemble.aggregate(1, replies, [])
        assert not found.refused
        web = drawn(ensemble, 2).count("web") / 3000
        assert web == pytest.approx(share, abs=0.03)
        assert found.log["agreement_weights"] == {"a": pytest.approx(1.0)}
        assert (found.log["clients"], found.log["answers"]) == (2, 2)


def test_who_says_nothing_on_an_anchor_is_not_drawn_there(tmp_path):
    ensemble = ensemble_of(tmp_path, entropy_power=1.0)
    first, second = [""] * 10 + ["web"] * 10, ["games"] * 15 + [" "] * 5
    ensemble.aggregate(1, {"c0": said(first), "c1": said(second)}, [])
    answers = drawn(ensemble, 2)
    assert answers[:10] == ["games"] * 10
    assert set(answers[10:15]) <= {"web", "games"}
    assert answers[15:] == ["web"] * 5
    ensemble.aggregate(2, {"c0": said([""] * 20)}, [])
    assert drawn(ensemble, 3) == [""] * 20
    assert ensemble.purposes(3, "a") == ["predict"]  # there is nothing to fit


def test_one_who_answers_at_random_is_hardly_heard(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=200)]

    def mostly_right():
        return np.where(rng.random(200) < 0.8, truth, words[rng.integers(4, size=200)]).tolist()

    replies = {f"c{n}": said(mostly_right()) for n in range(3)}
    replies["b0"] = said(words[rng.integers(4, size=200)].tolist())
    found = ensemble_of(tmp_path, 200, balance=0).aggregate(1, replies, [])
    assert found.log["agreement_weights"]["b"] < 0.1


def test_malformed_answers_are_refused_and_the_others_heard(tmp_path):
    ensemble = ensemble_of(tmp_path)
    fine = ["web"] * 20
    bad = {
        "c1": said(fine[:5]),
        "c2": said(["x" * (LONGEST_ANSWER + 1)] * 20),
        "c3": said(fine, np.nan),
        "c4": said(fine, 1.5),
        "c5": None,
        "c6": Said(np.ones((20, 1), np.float32)).to_payload(),
        "c7": Said(np.ones((20, 2), np.float32), fine).to_payload(),
    }
    found = ensemble.aggregate(1, {"c0": said(fine), **bad}, [])
    assert set(found.refused) == set(bad)
    assert found.log["clients"] == 1
    assert drawn(ensemble, 2) == fine
    assert drawn(ensemble, 3) is None  # they were about round 2's anchors
    assert ensemble.aggregate(2, bad, []).log == {}
    assert drawn(ensemble, 3) is None


def test_with_the_scope_of_a_type_nothing_crosses_and_a_checkpoint_keeps_the_answers(tmp_path):
    ensemble = ensemble_of(tmp_path, pool_over="type")
    ensemble.aggregate(1, {"c0": said(["web"] * 20), "b0": said(["games"] * 20)}, [])
    again = ensemble_of(tmp_path, pool_over="type")
    save_state(tmp_path / "memory", ensemble.state_dict())
    again.load_state_dict(load_state(tmp_path / "memory"))
    for one in (ensemble, again):
        assert drawn(one, 2, "a") == ["web"] * 20
        assert drawn(one, 2, "b") == ["games"] * 20
        assert drawn(one, 2, "c") is None


def test_the_same_seed_draws_the_same(tmp_path):
    rng = np.random.default_rng(3)
    replies = [(f"c{n}", said([f"word{n}" for n in rng.integers(9, size=20)])) for n in range(3)]
    found = []
    for _ in range(2):
        ensemble = ensemble_of(tmp_path)
        ensemble.aggregate(4, dict(replies), [])
        found.append(drawn(ensemble, 5))
    assert found[0] == found[1]


@example([list("a" * 20 + "bbbbb" + "aaa" + "bb"), list("a" * 20 + "bbbbb" + "aaa" + "bc")])
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=30, max_size=30), min_size=2, max_size=4)
)
def test_frequent_answers_become_equally_frequent_where_clients_leave_a_choice(answers):
    weights = np.full((len(answers), 30), 1 / len(answers))
    found = balance_answers(weights, answers, 20)
    np.testing.assert_allclose(found.sum(axis=0), 1)

    def masses(shares):
        mass = Counter()
        for own, row in zip(answers, shares, strict=True):
            for answer, share in zip(own, row, strict=True):
                mass[answer] += share
        return mass

    # What a single client gives, or hardly anybody, is not evened, and may lose to what is.
    told = Counter(answer for own in answers for answer in set(own))
    evens = [answer for answer, mass in masses(weights).items() if told[answer] > 1 and mass >= 2]

    def spread(shares):
        return np.std([masses(shares)[answer] for answer in evens]) if evens else 0.0

    assert spread(found) <= spread(weights) + 1e-6


@pytest.mark.parametrize("anchors", [16, 64, 200])
def test_free_text_is_not_evened(anchors):
    answers = [[f"answer {client} {n}" for n in range(anchors)] for client in range(3)]
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=anchors).T
    np.testing.assert_allclose(balance_answers(weights, answers, 5), weights)


def test_who_invents_an_answer_and_is_sure_of_it_is_not_lifted_above_its_weight(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=256)]

    def honest():
        return np.where(rng.random(256) < 0.7, truth, words[rng.integers(4, size=256)]).tolist()

    replies = {f"c{n}": said(honest(), 0.1) for n in range(8)}
    ensemble = ensemble_of(tmp_path, 256)
    ensemble.aggregate(1, {**replies, "c9": said(["evil"] * 256, 1.0)}, [])
    answers = drawn(ensemble, 2)
    assert answers.count("evil") < 0.12 * 256
    # The others' answers are evened all the same.
    counts = [answers.count(word) for word in words]
    assert max(counts) < 1.6 * min(counts)


def test_bags_compare_words_not_letters():
    found = bags(["Web Server", "server, web", "", "mail"])
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].sum() == 1
    assert found[2].sum() == 0
    assert found[0] @ found[3] == 0


# ------------------------------------------------------------------------------------- the wire


def test_requests_and_replies_in_words_travel():
    sent = DistillationRequest("abc", 40, 3, 1.0, answers=["web", "", "größer"], asked=3)
    assert DistillationRequest.from_payload(sent.to_payload()) == sent
    words = ["web", "", "ü"]
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    add_payloads(content, config, {"answers": said(words, [1.0, 0.2, 0.0])})
    read = Said.from_payload(read_payloads(content, config)["answers"])
    assert read.answers == words
    np.testing.assert_allclose(read.predictions[:, 0], [1.0, 0.2, 0.0], atol=0.01)


def test_a_request_with_the_wrong_number_of_answers_is_refused():
    wrong = DistillationRequest("abc", 40, 3, 1.0, answers=["web"]).to_payload()
    with pytest.raises(ExchangeError, match="expected 3 texts"):
        DistillationRequest.from_payload(wrong)
    with pytest.raises(ExchangeError, match="nothing"):
        as_answers(None, 3)
