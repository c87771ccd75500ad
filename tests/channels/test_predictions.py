"""Predictions on anchors: averaged on the server, fitted by clients of different models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from real_clients import DEEP, FEW, LORA, ask, run
from tiny_adapters import prepared
from tiny_backbones import LABELS
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors, round_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.predictions.record import DistillationRequest, as_probabilities
from heterotune_flwr.channels.predictions.server import (
    PredictionEnsemble,
    PredictionOptions,
    agreement_weights,
    confidence_weighted_mean,
    sinkhorn_balance,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import Example, training_pool
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.messages import TRAIN, Header, TrainReply, TrainRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig, TrainConfig
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.strategies.build import check_strategy
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

TRAINING = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01)


def probabilities(rng, n=20, classes=3, sharpness=2.0):
    logits = sharpness * rng.normal(size=(n, classes))
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


# ------------------------------------------------------------------------------------ the server


def test_voices_follow_agreement_with_the_others():
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


def test_the_mean_of_what_clients_say_is_the_next_rounds_lesson(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("".join(f"text {n}\n" for n in range(30)))
    options = PredictionOptions(
        anchors=20, pool=25, agreement_power=0.0, entropy_power=0.0, balance=0
    )
    consensus = PredictionEnsemble(options, AlignmentConfig(anchors=str(path)))
    assert consensus.lesson(1, "t").targets is None
    rng = np.random.default_rng(1)
    said = [probabilities(rng) for _ in range(2)]
    replies = [TrainReply(f"c{i}", "t", 1, "", {}, {}, p) for i, p in enumerate(said)]
    bad = [
        TrainReply("c2", "t", 1, "", {}, {}, None),
        TrainReply("c3", "t", 1, "", {}, {}, said[0][:5]),
        TrainReply("c4", "t", 1, "", {}, {}, np.zeros_like(said[0])),
        TrainReply("c5", "t", 1, "", {}, {}, np.full_like(said[0], np.nan)),
    ]
    log, refused = consensus.aggregate(1, [*replies, *bad], classes=3)
    assert set(refused) == {"c2", "c3", "c4", "c5"}
    assert log["clients"] == 2
    np.testing.assert_allclose(consensus.lesson(2, "t").targets, np.mean(said, axis=0), atol=1e-6)
    assert consensus.lesson(3, "t").targets is None  # they were about round 2's anchors
    assert consensus.aggregate(2, bad[:1], classes=3)[0] == {}
    assert consensus.lesson(3, "t").targets is None


def test_with_the_scope_of_a_type_nothing_crosses(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("".join(f"text {n}\n" for n in range(20)))
    options = PredictionOptions(anchors=20, pool=20, entropy_power=0.0, balance=0, pool_over="type")
    consensus = PredictionEnsemble(options, AlignmentConfig(anchors=str(path)))
    rng = np.random.default_rng(1)
    said = [probabilities(rng, n=20) for _ in range(3)]
    reply = [TrainReply(f"c{i}", "ab"[i // 2], 1, "", {}, {}, p) for i, p in enumerate(said)]
    happened, _ = consensus.aggregate(1, reply, said[0].shape[1])
    np.testing.assert_allclose(
        consensus.lesson(2, "a").targets, np.mean(said[:2], axis=0), atol=1e-6
    )
    np.testing.assert_allclose(consensus.lesson(2, "b").targets, said[2], atol=1e-6)
    assert consensus.lesson(2, "c").targets is None
    assert happened["clients"] == 3
    again = PredictionEnsemble(options, AlignmentConfig(anchors=str(path)))
    again.load_state_dict(consensus.state_dict())
    np.testing.assert_array_equal(again.lesson(2, "b").targets, consensus.lesson(2, "b").targets)


def test_fewer_anchors_than_asked_for_are_all_used(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("".join(f"text {n}\n" for n in range(30)))
    lesson = PredictionEnsemble(PredictionOptions(), AlignmentConfig(anchors=str(path))).lesson(
        1, "t"
    )
    assert (lesson.pool, lesson.count) == (30, 30)


@pytest.mark.parametrize(
    ("given_options", "said"),
    [
        ({"anchor": 3}, "no key 'anchor'"),
        ({"anchors": 0}, "whole number from 1"),
        ({"anchors": 2.5}, "whole number"),
        ({"anchors": 30, "pool": 20}, "more than the 20"),
        ({"batch": -1}, "whole number from 0"),
        ({"weight": -1}, "not negative"),
        ({"weight": float("nan")}, "not negative"),
        ({"agreement_power": True}, "not negative"),
        ({"informativeness_power": -1}, "not negative"),
        ({"informativeness_power": 20}, "informativeness_power is 20; 8 at most"),
        ({"pool_over": "everybody"}, "all or type"),
        ("yes", "key: value"),
    ],
)
def test_wrong_options_are_named(given_options, said):
    with pytest.raises(ConfigError, match=said):
        PredictionOptions.read(given_options)


def test_a_wrong_option_is_found_before_anything_runs_and_says_whose_it_is():
    config = compose("demo", f"run.compare=[{DEEP}] strategies.{DEEP}.predictions.anchors=0")
    with pytest.raises(
        ConfigError, match=r"strategies\.heterotune_deep: predictions\.anchors is 0"
    ):
        check_strategy(DEEP, config.strategies[DEEP], config)


# ------------------------------------------------------------------------------------- the wire


def lesson_content(lesson):
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    lesson.add_to(content, config)
    return content, config


def test_lessons_travel_as_one_byte_per_probability():
    targets = probabilities(np.random.default_rng(2), n=256, classes=16)
    content, config = lesson_content(DistillationRequest("abc", 1024, 256, 1.0, targets))
    assert content_bytes(content) < 256 * 16 + 400
    read = DistillationRequest.read(content, config)
    assert (read.digest, read.pool, read.count, read.weight) == ("abc", 1024, 256, 1.0)
    np.testing.assert_allclose(read.targets, targets, atol=0.02)
    np.testing.assert_allclose(read.targets.sum(1), 1, atol=1e-6)
    content, config = lesson_content(DistillationRequest("abc", 1024, 256, 1.0))
    assert DistillationRequest.read(content, config).targets is None
    assert DistillationRequest.read(content, config).informativeness_power == 0
    assert (
        DistillationRequest.read(
            *lesson_content(DistillationRequest("abc", 9, 9, 1.0, informativeness_power=1.5))
        ).informativeness_power
        == 1.5
    )
    assert DistillationRequest.read(RecordDict({}), ConfigRecord({})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 2000},
        {"weight": -1.0},
        {"weight": float("inf")},
        {"pool": "many"},
        {"batch": -1},
        {"informativeness_power": -1.0},
        {"informativeness_power": 9.0},
        {"informativeness_power": float("nan")},
    ],
)
def test_impossible_lessons_are_refused(change):
    _, config = lesson_content(DistillationRequest("abc", 1024, 256, 1.0))
    config["predictions"] = json.dumps({**json.loads(config["predictions"]), **change})
    with pytest.raises(ExchangeError):
        DistillationRequest.read(RecordDict({"config": config}), config)


def test_targets_of_another_number_of_anchors_are_refused():
    targets = probabilities(np.random.default_rng(2), n=7)
    content, config = lesson_content(DistillationRequest("abc", 1024, 256, 1.0, targets))
    with pytest.raises(ExchangeError, match="expected 256"):
        DistillationRequest.read(content, config)
    with pytest.raises(ExchangeError):
        as_probabilities(-targets, 7)


def test_both_sides_draw_the_same_anchors():
    drawn = round_anchors(100, 30, seed=3, round=5)
    assert drawn == round_anchors(100, 30, seed=3, round=5)
    assert len(set(drawn)) == 30
    assert drawn != round_anchors(100, 30, seed=3, round=6)
    assert sorted(round_anchors(10, 30, seed=3, round=5)) == list(range(10))


# ------------------------------------------------------------------------------------ the client


def test_a_client_comes_closer_to_the_consensus_and_nowhere_without_weight(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TRAINING)
    adapter = prepared(backbone)
    start = adapter.read()
    own = make_rows(adapter, task.encode(training_pool(data)[:8]), cache=True)
    texts = [Example(f"public words {n}", LABELS[0]) for n in range(12)]
    anchors = make_rows(adapter, task.encode(texts), cache=True)
    chosen, rng = [3, 1, 4, 5, 9, 2], np.random.default_rng(0)
    wanted = probabilities(rng, n=6, classes=len(LABELS), sharpness=4.0)

    work = replace(TRAINING, local_steps=40)

    def train(weight):
        adapter.load(start)
        distillation = Distillation(anchors, chosen, torch.from_numpy(wanted), weight)
        fit(adapter, task, work, [Examples(own), distillation], seed=1)
        said = predict(task, anchors, chosen)
        return float(-(wanted * np.log(said)).sum(1).mean()), adapter.read()

    untouched = predict(task, anchors, chosen)
    np.testing.assert_allclose(untouched.sum(1), 1, atol=1e-5)
    far, without = train(0.0)
    near, _ = train(8.0)
    assert near < far - 0.02
    adapter.load(start)
    rng = np.random.default_rng(1)
    distillation = Distillation(anchors, chosen, torch.from_numpy(wanted), 0.0)
    fit(adapter, task, work, [Examples(own), distillation], seed=1)
    for name, value in adapter.read().items():
        np.testing.assert_array_equal(value, without[name])


def test_the_anchors_gradient_is_their_cross_entropys(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TRAINING)
    adapter = prepared(backbone)
    texts = [Example(f"public words {n}", LABELS[0]) for n in range(4)]
    anchors = make_rows(adapter, task.encode(texts), cache=False)
    wanted = torch.from_numpy(probabilities(np.random.default_rng(0), 4, len(LABELS)))
    losses = Distillation(anchors, [0, 1, 2, 3], wanted, 0.5).losses(task, [2, 0])
    states, _, _ = anchors.rows([2, 0])
    head = backbone.model.get_output_embeddings()
    tokens = [backbone.tokenizer(" " + word)["input_ids"][0] for word in LABELS]
    logits = head(states)[:, tokens].float()
    expected = -0.5 * (wanted[[2, 0]] * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_what_the_rows_add_is_in_what_is_fitted(directory, data, share):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TRAINING)
    adapter = prepared(backbone)
    encoded = task.encode([Example(f"public words {n}", LABELS[0]) for n in range(4)])
    added = torch.randn(4, len(LABELS), generator=torch.Generator().manual_seed(0))
    rows = make_rows(adapter, encoded, cache=False, offsets=added)
    wanted = torch.from_numpy(probabilities(np.random.default_rng(0), 4, len(LABELS)))
    lesson = Distillation(rows, range(4), wanted, 1.0, offsets=share)
    found = lesson.losses(task, [3, 1])
    states, _, _ = rows.rows([3, 1])
    logs = (task.label_logits(states) + share * added[[3, 1]]).log_softmax(-1)
    torch.testing.assert_close(found, -(wanted[[3, 1]] * logs).sum(-1), rtol=1e-4, atol=1e-5)
    whole = torch.from_numpy(predict(task, rows, [3, 1]))  # what is said has all of it
    torch.testing.assert_close(whole, (task.label_logits(states) + added[[3, 1]]).softmax(-1))


def test_anchors_are_drawn_as_often_as_their_targets_say_something():
    """Chances ~ (log C - H)^informativeness_power, of single draws."""
    wanted = torch.tensor(
        [[0.97, 0.01, 0.01, 0.01], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    )
    told = [np.log(4) + 0.97 * np.log(0.97) + 0.03 * np.log(0.01), np.log(2), 1e-3]

    def shares(informativeness_power, targets=wanted, draws=4000):
        lesson = Distillation(
            None, [7, 8, 9], targets, 1.0, batch=1, informativeness_power=informativeness_power
        )
        rng = np.random.default_rng(0)
        drawn = [lesson.draw(16, rng) for _ in range(draws)]
        assert {len(anchors) for anchors in drawn} == {1}
        return np.bincount([anchor for (anchor,) in drawn], minlength=10)[7:] / draws

    for informativeness_power in (0.5, 1.0, 2.0):
        expected = np.power(told, informativeness_power)
        np.testing.assert_allclose(
            shares(informativeness_power), expected / expected.sum(), atol=0.02
        )
    np.testing.assert_allclose(shares(0.0), np.full(3, 1 / 3), atol=0.03)
    np.testing.assert_allclose(shares(1.0, targets=None), np.full(3, 1 / 3), atol=0.03)


def test_a_step_never_draws_an_anchor_twice_however_sharp_the_focus():
    wanted = torch.from_numpy(
        probabilities(np.random.default_rng(3), n=12, classes=4, sharpness=9.0)
    )
    lesson = Distillation(None, range(12), wanted, 1.0, batch=9, informativeness_power=8.0)
    rng = np.random.default_rng(0)
    assert all(len(set(lesson.draw(4, rng))) == 9 for _ in range(50))
    whole = Distillation(
        None, range(12), torch.full((12, 4), 0.25), 1.0, batch=12, informativeness_power=8.0
    )
    assert sorted(whole.draw(4, rng)) == list(range(12))


def test_the_options_focus_is_every_lessons(tmp_path):
    path = tmp_path / "anchors.txt"
    path.write_text("".join(f"text {n}\n" for n in range(30)))
    consensus = PredictionEnsemble(
        PredictionOptions(informativeness_power=1.5), AlignmentConfig(anchors=str(path))
    )
    assert (
        consensus.lesson(1, "t").informativeness_power
        == consensus.guest_request(1, "t").informativeness_power
        == 1.5
    )


def test_a_client_draws_as_its_lesson_says(world, folder):
    """The first eight anchors are certain, the others say nothing: with informativeness_power they alone are learnt."""
    told = world.describe(0, LORA)
    texts = load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=24))
    targets = np.full((24, 3), 1 / 3, np.float32)
    targets[:8] = [1.0, 0.0, 0.0]

    def deltas(informativeness_power, targets):
        lesson = DistillationRequest(
            anchor_digest(texts),
            24,
            24,
            1.0,
            targets,
            batch=4,
            asked=0,
            informativeness_power=informativeness_power,
        )
        header, names = Header("run", 0, LORA, 1), sorted(told.shapes)
        request = TrainRequest(header, {}, "", None, names, 3, 0.05, lesson=lesson)
        return TrainReply.from_content(world.ask(0, TRAIN, request.to_content("fp32"))).deltas

    other = targets.copy()
    other[8:] = [0.4, 0.3, 0.3]  # says something, but little
    focused, alike = (
        [deltas(informativeness_power, t) for t in (targets, other)]
        for informativeness_power in (8.0, 0.0)
    )
    for name in focused[0]:
        np.testing.assert_array_equal(focused[0][name], focused[1][name])
    assert any((alike[0][name] != alike[1][name]).any() for name in alike[0])


def test_a_client_with_other_anchors_says_so(world, folder):
    with pytest.raises(RemoteError, match="not those of the server"):
        ask(world, DistillationRequest("another", 40, 8, 1.0))


def test_targets_for_other_labels_are_refused(world, folder):
    texts = load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=40))
    targets = probabilities(np.random.default_rng(0), n=8, classes=5)
    with pytest.raises(RemoteError, match="expected 8 x 3"):
        ask(world, DistillationRequest(anchor_digest(texts), 40, 8, 1.0, targets))
    reply = ask(world, DistillationRequest(anchor_digest(texts), 40, 8, 1.0, targets[:, :3]))
    assert reply.predictions.shape == (8, 3)


def test_every_client_is_heard_every_round(world, folder):
    strategy = run(world, DEEP, rounds=2, overrides=FEW)
    heard = [e["predictions"] for e in strategy.outcome.rounds if e["event"] == "round"]
    assert [entry["clients"] for entry in heard] == [4, 4]
    assert set(heard[0]["agreement_weights"]) == set(strategy.roster.type_keys)


def test_the_same_seed_gives_the_same_bank_and_the_consensus_changes_it(world):
    on = [run(world, DEEP, rounds=3, overrides=FEW) for _ in range(2)]
    off = run(world, DEEP, rounds=3, overrides=f"{FEW} strategies.{DEEP}.predictions=null")
    for name, value in on[0].shared_tensors().items():
        np.testing.assert_array_equal(value, on[1].shared_tensors()[name])
    assert any(
        not np.array_equal(value, off.shared_tensors()[name])
        for name, value in on[0].shared_tensors().items()
    )
    assert off.consensus is None
    extra = on[0].outcome.bytes["up_per_client_round"] - off.outcome.bytes["up_per_client_round"]
    assert 16 * 3 <= extra < 16 * 3 + 400  # and two manifests


def test_open_text_has_no_consensus_and_fedmkt_says_so(world):
    strategy = run(world, DEEP, rounds=1, overrides=f"{FEW} train.loss=tokens")
    assert strategy.consensus is None
    with pytest.raises(ConfigError, match="no closed label set"):
        run(world, "fedmkt", rounds=1, overrides="train.loss=tokens")


def test_fedmkt_shares_predictions_and_no_tensor(world):
    strategy = run(world, "fedmkt", rounds=2, overrides="strategies.fedmkt.predictions.anchors=16")
    assert strategy.state == {}
    assert strategy.outcome.bytes["up_per_client_round"] < 800
    states = [world.state(client, strategy.context.experiment) for client in range(4)]
    assert all(any(name.startswith("lora.") for name in own) for own in states)


def test_clients_that_say_nothing_cost_the_round_nothing(tmp_path):
    """Clients that know no anchors: their updates count, their silence is on record."""
    config = toy_config(tmp_path, (2, 1, 1), rounds=1)
    federation = ToyFederation(config, silent=True)
    journal = Journal(tmp_path / "journal")
    session = Session(federation.grid(), config, journal, "toy-0")
    spec = {
        "_component_": "heterotune_flwr.strategies.HeteroTune",
        "predictions": {"anchors": 16, "pool": 16},
    }
    strategy = build_strategy(spec, StrategyContext("toy", config, 0, session))
    strategy.start(session.grid)
    events = [e for e in strategy.outcome.rounds if e["event"] == "round"]
    assert events[0]["clients"] == 4
    assert events[0]["predictions"] == {}
