"""Predictions on anchors: averaged on the server, fitted by clients of different models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from facts import opened, probabilities, run_facts, texts
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from real_clients import DEEP

from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.channels.channel import Unlabelled
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
    as_probabilities,
)
from heterotune_flwr.channels.predictions.server import (
    agreement_weights,
    confidence_weighted_mean,
    sinkhorn_balance,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.payloads import add_payloads, read_payloads
from heterotune_flwr.strategies.build import check_strategy

# ------------------------------------------------------------------------------------ the server


def test_weights_follow_agreement_with_the_others():
    rng = np.random.default_rng(0)
    truth = probabilities(rng)
    noisy = [0.8 * truth + 0.2 * probabilities(rng) for _ in range(3)]
    contrary = truth[:, ::-1]
    shares = agreement_weights([*noisy, contrary], agreement_power=2.0)
    assert sum(shares) == pytest.approx(1)
    assert shares[3] < 0.05 < 0.25 < min(shares[:3])
    assert agreement_weights([*noisy, contrary], agreement_power=0.0) == [0.25] * 4
    assert agreement_weights([truth, contrary], agreement_power=1.0) == [
        0.5,
        0.5,
    ]  # of two nobody can tell who is right
    order = [2, 0, 3, 1]
    again = agreement_weights([[*noisy, contrary][i] for i in order], agreement_power=2.0)
    np.testing.assert_allclose(again, [shares[i] for i in order])


@given(arrays(np.float64, (12, 4), elements=st.floats(0.01, 1.0)))
def test_balanced_targets_stay_probabilities_and_lose_the_labels_frequencies(raw):
    targets = raw / raw.sum(1, keepdims=True)
    found = sinkhorn_balance(targets, 50)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(found.mean(0), 0.25, atol=1e-3)
    # A label that is k times as likely everywhere changes nothing: only differences between anchors count.
    tilted = targets * np.array([5.0, 1.0, 0.5, 2.0])
    np.testing.assert_allclose(
        sinkhorn_balance(tilted / tilted.sum(1, keepdims=True), 50), found, atol=1e-3
    )
    np.testing.assert_array_equal(sinkhorn_balance(targets, 0), targets)


def test_who_is_sure_speaks_louder_on_that_anchor():
    sure, unsure = [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]
    predictions = np.array([[sure, unsure], [unsure, sure[::-1]]], np.float32)
    mean, shares = confidence_weighted_mean(predictions, [0.5, 0.5], 1.0)
    entropy = -sum(p * np.log(p) for p in sure)
    louder = np.exp(-entropy) / (np.exp(-entropy) + 0.25)  # the entropy of the unsure is ln 4
    np.testing.assert_allclose(mean[0], louder * np.array(sure) + (1 - louder) / 4, rtol=1e-6)
    np.testing.assert_allclose(mean[1], mean[0][::-1], rtol=1e-6)
    assert shares == pytest.approx([0.5, 0.5])
    even, shares = confidence_weighted_mean(predictions, [0.2, 0.8], 0.0)
    expected = 0.2 * predictions[0].astype(float) + 0.8 * predictions[1].astype(float)
    np.testing.assert_allclose(even, expected, rtol=1e-6)
    assert shares == pytest.approx([0.2, 0.8])


def told(values):
    """What clients reply, by id."""
    return {f"c{n}": None if p is None else Said(p).to_payload() for n, p in enumerate(values)}


def asked(ensemble, server_round, client_id, purpose="train"):
    return DistillationRequest.from_payload(ensemble.request(server_round, client_id, {purpose}))


PLAIN = {"agreement_power": 0.0, "entropy_power": 0.0, "balance": 0}


def test_the_mean_of_what_clients_predict_is_what_all_fit_in_the_next_round(tmp_path):
    facts = run_facts({f"c{n}": "t" for n in range(6)}, texts(tmp_path / "anchors.txt", 30))
    ensemble = opened("predictions", facts, anchors=20, pool=25, **PLAIN)
    assert ensemble.purposes(1, "t") == ["predict"]
    rng = np.random.default_rng(1)
    said = [probabilities(rng) for _ in range(2)]
    bad = [None, said[0][:5], np.zeros_like(said[0]), np.full_like(said[0], np.nan)]
    found = ensemble.aggregate(1, told([*said, *bad]), [])
    assert set(found.refused) == {"c2", "c3", "c4", "c5"}
    assert found.log["clients"] == 2
    assert ensemble.purposes(2, "t") == ["predict", "fit"]
    request = asked(ensemble, 2, "c0")
    np.testing.assert_allclose(request.targets, np.mean(said, axis=0), atol=1e-6)
    assert (request.pool, request.count, request.wanted) == (25, 20, 20)
    assert asked(ensemble, 3, "c0").targets is None  # they were about round 2's anchors
    assert ensemble.aggregate(2, told(bad[:1]), []).log == {}
    assert asked(ensemble, 3, "c0").targets is None


def test_with_the_scope_of_a_type_nothing_crosses(tmp_path):
    facts = run_facts(
        {"c0": "a", "c1": "a", "c2": "b", "c3": "c"}, texts(tmp_path / "anchors.txt", 20)
    )
    ensemble = opened("predictions", facts, **PLAIN, pool_over="type")
    rng = np.random.default_rng(1)
    said = [probabilities(rng) for _ in range(3)]
    found = ensemble.aggregate(1, told(said), [])
    of_type = {"a": "c0", "b": "c2", "c": "c3"}
    targets = {key: asked(ensemble, 2, client_id).targets for key, client_id in of_type.items()}
    np.testing.assert_allclose(targets["a"], np.mean(said[:2], axis=0), atol=1e-6)
    np.testing.assert_allclose(targets["b"], said[2], atol=1e-6)
    assert targets["c"] is None
    assert found.log["clients"] == 3
    again = opened("predictions", facts, **PLAIN, pool_over="type")
    again.load_state_dict(ensemble.state_dict())
    np.testing.assert_array_equal(asked(again, 2, "c2").targets, targets["b"])


def test_fewer_anchors_than_asked_for_are_all_used_and_every_request_says_how_to_draw(tmp_path):
    facts = run_facts(anchors=texts(tmp_path / "anchors.txt", 30))
    ensemble = opened("predictions", facts, batch=7)
    request = asked(ensemble, 1, "c0")
    assert (request.pool, request.count, request.batch) == (30, 30, 7)
    assert asked(ensemble, 1, "c0", "unlabelled").batch == 7


def test_what_a_client_is_asked_depends_on_what_its_message_is_for(tmp_path):
    facts = run_facts(anchors=texts(tmp_path / "anchors.txt", 20), rounds=1, guests=True)
    ensemble = opened("predictions", facts, anchors=12, pool=12, guest_anchors=20, **PLAIN)
    assert ensemble.request(1, "c0", {"test"}) is None
    assert asked(ensemble, 1, "c0").wanted == 20  # in the last round guests need all there are
    assert ensemble.unlabelled(2, "a") is None
    said = probabilities(np.random.default_rng(0))
    ensemble.aggregate(1, told([said]), [])
    assert ensemble.unlabelled(2, "a") == Unlabelled(steps=480, examples=20)
    brought = asked(ensemble, 2, "c0", "unlabelled")
    assert (brought.count, brought.wanted) == (20, 0)
    np.testing.assert_allclose(brought.targets, said, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor": 3},
        {"anchors": 0},
        {"anchors": 30, "pool": 20},
        {"pool": 9, "anchors": 9},
        {"batch": -1},
        {"weight": -1},
        {"agreement_power": True},
        {"informativeness_power": 1},
        {"pool_over": "everybody"},
    ],
)
def test_a_wrong_option_is_found_before_anything_runs_and_says_whose_it_is(wrong):
    config = compose("demo", f"run.compare=[{DEEP}]")
    with pytest.raises(ConfigError, match=rf"strategies\.{DEEP}: predictions.*{next(iter(wrong))}"):
        check_strategy(DEEP, {**config.strategies[DEEP], "predictions": wrong}, config)


# ------------------------------------------------------------------------------------- the wire


def travelled(record):
    """A record as it comes out of a message."""
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    add_payloads(content, config, {"predictions": record.to_payload()})
    payload = read_payloads(content, config)["predictions"]
    return type(record).from_payload(payload), content_bytes(content)


def test_requests_travel_as_one_byte_per_probability():
    targets = probabilities(np.random.default_rng(2), n=256, classes=16)
    sent = DistillationRequest("abc", 1024, 256, 1.0, targets, batch=3)
    read, size = travelled(sent)
    assert size < 256 * 16 + 500
    assert replace(read, targets=None) == replace(sent, targets=None, asked=256)
    np.testing.assert_allclose(read.targets, targets, atol=0.02)
    np.testing.assert_allclose(read.targets.sum(1), 1, atol=1e-6)
    read, _ = travelled(DistillationRequest("abc", 1024, 256, 1.0))
    assert read.targets is None


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 2000},
        {"weight": -1.0},
        {"weight": float("inf")},
        {"pool": "many"},
        {"batch": -1},
        {"asked": -1},
    ],
)
def test_impossible_requests_are_refused(change):
    payload = DistillationRequest("abc", 1024, 256, 1.0).to_payload()
    with pytest.raises(ExchangeError):
        DistillationRequest.from_payload(replace(payload, fields={**payload.fields, **change}))


def test_a_request_without_one_of_its_fields_is_refused():
    payload = DistillationRequest("abc", 1024, 256, 1.0).to_payload()
    for name in payload.fields:
        fields = {key: value for key, value in payload.fields.items() if key != name}
        with pytest.raises(ExchangeError, match=name):
            DistillationRequest.from_payload(replace(payload, fields=fields))


def test_targets_of_another_number_of_anchors_or_name_are_refused():
    targets = probabilities(np.random.default_rng(2), n=7)
    with pytest.raises(ExchangeError, match="expected 256"):
        travelled(DistillationRequest("abc", 1024, 256, 1.0, targets))
    payload = DistillationRequest("abc", 7, 7, 1.0).to_payload()
    with pytest.raises(ExchangeError, match="nothing"):
        DistillationRequest.from_payload(replace(payload, tensors={"more": targets}))
    with pytest.raises(ExchangeError, match="more"):
        Said.from_payload(replace(Said(targets).to_payload(), tensors={"more": targets}))
    with pytest.raises(ExchangeError, match="no probabilities"):
        as_probabilities(-targets, 7)


def test_both_sides_draw_the_same_anchors():
    drawn = round_anchors(100, 30, seed=3, round=5)
    assert drawn == round_anchors(100, 30, seed=3, round=5)
    assert len(set(drawn)) == 30
    assert drawn != round_anchors(100, 30, seed=3, round=6)
    assert sorted(round_anchors(10, 30, seed=3, round=5)) == list(range(10))
