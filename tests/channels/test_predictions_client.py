"""Predictions on a client: what it fits and draws, and whole runs in which it is heard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from facts import probabilities
from real_clients import DEEP, FEW, ask, run
from tiny_adapters import TRAINING, prepared
from tiny_backbones import LABELS
from toy_federation import ToyFederation, toy_config
from toy_runs import start

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
)
from heterotune_flwr.data.sources import Example, training_pool
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task


def test_a_client_comes_closer_to_the_mean_and_nowhere_without_weight(directory, data):
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


def test_a_step_never_draws_an_anchor_twice():
    wanted = torch.full((12, 4), 0.25)
    rng = np.random.default_rng(0)
    lesson = Distillation(None, range(12), wanted, 1.0, batch=9)
    assert all(len(set(lesson.draw(4, rng))) == 9 for _ in range(50))
    whole = Distillation(None, range(12), wanted, 1.0, batch=12)
    assert sorted(whole.draw(4, rng)) == list(range(12))
    assert len(Distillation(None, range(12), wanted, 1.0).draw(4, rng)) == 4


def digest_of(folder, count):
    return anchor_digest(
        load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=count))
    )


def test_a_client_with_other_anchors_says_so(world):
    with pytest.raises(RemoteError, match="not those of the server"):
        ask(world, DistillationRequest("another", 40, 8, 1.0))


def test_targets_for_other_labels_are_refused(world, folder):
    digest = digest_of(folder, 40)
    targets = probabilities(np.random.default_rng(0), n=8, classes=5)
    with pytest.raises(RemoteError, match="expected 8 x 3"):
        ask(world, DistillationRequest(digest, 40, 8, 1.0, targets))
    reply = ask(world, DistillationRequest(digest, 40, 8, 1.0, targets[:, :3]))
    assert Said.from_payload(reply.channels["predictions"]).predictions.shape == (8, 3)
    silent = ask(world, DistillationRequest(digest, 40, 8, 1.0, targets[:, :3], asked=0))
    assert "predictions" not in silent.channels


def logs(strategy):
    """What the rounds say of predictions."""
    rounds = [e for e in strategy.outcome.rounds if e["event"] == "round"]
    return [entry["channels"]["predictions"] for entry in rounds]


def test_every_client_is_heard_every_round(world):
    strategy = run(world, DEEP, rounds=2, overrides=FEW)
    assert [entry["clients"] for entry in logs(strategy)] == [4, 4]
    assert set(logs(strategy)[0]["agreement_weights"]) == set(strategy.roster.type_keys)


def test_the_same_seed_gives_the_same_bank_and_predictions_change_it(world):
    on = [run(world, DEEP, rounds=3, overrides=FEW) for _ in range(2)]
    off = run(world, DEEP, rounds=3, overrides=f"{FEW} strategies.{DEEP}.predictions=null")
    for name, value in on[0].shared_tensors().items():
        np.testing.assert_array_equal(value, on[1].shared_tensors()[name])
    assert any(
        not np.array_equal(value, off.shared_tensors()[name])
        for name, value in on[0].shared_tensors().items()
    )
    assert [channel.name for channel in off.channels] == ["statistics"]
    extra = on[0].outcome.bytes["up_per_client_round"] - off.outcome.bytes["up_per_client_round"]
    assert 16 * 3 <= extra < 16 * 3 + 400  # and two manifests


def test_without_symbols_open_text_has_no_predictions_and_fedmkt_says_so(world):
    strategy = run(world, DEEP, rounds=1, overrides=f"{FEW} train.loss=tokens")
    assert strategy.channels == []
    events = read_events(world.path / "journal" / "rounds.jsonl")
    off = {e["channel"]: e["reason"] for e in events if e["event"] == "channel_off"}
    assert set(off) == {"predictions", "statistics"}
    assert "closed label set" in off["statistics"]
    assert "alignment.output=vocabulary" in off["predictions"]
    with pytest.raises(ConfigError, match="vocabularies have in common"):
        run(world, "fedmkt", rounds=1, overrides="train.loss=tokens")


def test_fedmkt_shares_predictions_and_no_tensor(world):
    strategy = run(world, "fedmkt", rounds=2, overrides="strategies.fedmkt.predictions.anchors=16")
    assert not any(strategy.state.values())
    assert strategy.outcome.bytes["up_per_client_round"] < 800
    states = [world.state(client, strategy.context.experiment) for client in range(4)]
    assert all(any(name.startswith("lora.") for name in own) for own in states)


def test_clients_that_say_nothing_cost_the_round_nothing(tmp_path):
    """Clients that know no anchors: their updates count, their silence is on record."""
    config = toy_config(tmp_path, (2, 1, 1), rounds=1)
    spec = {
        "_component_": "heterotune_flwr.strategies.HeteroTune",
        "predictions": {"anchors": 16, "pool": 16},
    }
    strategy, events = start(config, ToyFederation(config, silent=True), spec=spec)
    (entry,) = [e for e in events if e["event"] == "round"]
    assert entry["clients"] == 4
    assert logs(strategy) == [{}]
    refused = [e for e in events if e["event"] == "payload_refused"]
    assert {(e["channel"], e["client_id"]) for e in refused} == {
        ("predictions", f"client-000{n}") for n in range(4)
    }
