"""The shared discriminant on a client: what it tells of its classes, and where it adds the logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from real_clients import DEEP, FEW, run
from scipy.special import log_softmax
from tiny_adapters import with_maps
from tiny_backbones import LABELS

from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.statistics.client import class_sums, classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.client.identity import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.protocol.messages import (
    TRAIN,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.states import bare_states, make_rows


def test_bare_states_are_the_backbones_whatever_is_attached(adapted):
    adapter, _, encoded = adapted
    found = bare_states(adapter, encoded)
    adapter.load({name: np.zeros(shape, np.float32) for name, shape in adapter.shapes.items()})
    rows = make_rows(adapter, encoded, cache=False)
    states, _, _ = rows.rows(range(len(encoded)))
    torch.testing.assert_close(found, states.detach(), rtol=1e-5, atol=1e-5)
    with_maps(adapter)
    changed, _, _ = rows.rows(range(len(encoded)))
    assert float((changed.detach() - found).abs().max()) > 1e-2  # and what was off is on again


def test_a_client_tells_of_classes_with_enough_examples(adapted):
    adapter, task, encoded = adapted
    labels = np.array([targets[0] for targets in encoded.targets])
    counts = np.bincount(labels, minlength=len(LABELS))
    least = int(counts.min()) + 1
    found = class_sums(adapter, task, encoded, least)
    from heterotune_flwr.dema import read_maps

    maps = read_maps(adapter.model)
    down, offset = (maps[f"slots.0.map.down.{what}"] for what in ("weight", "bias"))
    latents = bare_states(adapter, encoded).double().numpy() @ down.T.astype(float) + offset
    kept = counts >= least
    assert kept.any()
    assert not kept.all()
    np.testing.assert_array_equal(found.counts, counts * kept)
    expected = np.stack([latents[labels == c].sum(axis=0) for c in range(len(LABELS))])
    np.testing.assert_allclose(found.sums, expected * kept[:, None], rtol=1e-4, atol=1e-4)
    assert class_sums(adapter, task, encoded, 0) is None


def test_its_logits_add_to_predictions_and_tests(adapted):
    adapter, task, encoded = adapted
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, adapter.method.latent)).astype(np.float32)
    shared = LinearClassifier(weight, rng.normal(size=3).astype(np.float32))
    added = classifier_logits(shared, adapter, task, encoded)
    alone, both = (make_rows(adapter, encoded, offsets=o) for o in (None, added))
    chosen = [4, 0, 7]
    before = np.log(predict(task, alone, chosen).astype(float))
    expected = log_softmax(before + added.numpy()[chosen], axis=1)
    np.testing.assert_allclose(np.log(predict(task, both, chosen)), expected, atol=1e-4)
    targets = torch.from_numpy(rng.dirichlet(np.ones(3), len(encoded)).astype(np.float32))
    distill_share = Distillation(both, range(len(encoded)), targets, 2.0).losses(task, chosen)
    wanted = -2.0 * (targets.numpy()[chosen] * expected).sum(axis=1)
    np.testing.assert_allclose(distill_share.detach(), wanted, atol=1e-4)
    prior = torch.tensor([0.0, -1.0, 2.0])
    everything = range(len(encoded))
    logs = np.log(predict(task, alone, everything).astype(float)) + added.numpy() + prior.numpy()
    labels = [targets[0] for targets in encoded.targets]
    report = evaluate(adapter, task, both, prior)
    right = log_softmax(logs, axis=1)[np.arange(len(labels)), labels]
    assert report.loss == pytest.approx(-right.mean(), abs=1e-4)
    assert report.accuracy == pytest.approx((logs.argmax(axis=1) == labels).mean())
    assert classifier_logits(None, adapter, task, encoded) is None
    other = LinearClassifier(np.zeros((3, 5), np.float32), np.zeros(3, np.float32))
    one_label = LinearClassifier(np.zeros((1, 8), np.float32), np.zeros(1, np.float32))
    endless = replace(shared, bias=np.array([0, np.inf, 0], np.float32))
    for wrong, said in (
        (other, "of 3 labels and 5 latents, here are 3 and 8"),
        (one_label, "of 1 labels"),
        (endless, "not finite"),
    ):
        with pytest.raises(ExchangeError, match=said):
            classifier_logits(wrong, adapter, task, encoded)
    pieces = classifier_logits(shared, adapter, task, encoded, cache=False)
    torch.testing.assert_close(pieces, added)


def test_training_does_not_see_it(world):
    """On own examples: the same deltas with and without; the tests differ."""
    strategy = run(
        world, DEEP, rounds=1, overrides=f"{FEW} strategies.{DEEP}.statistics.weight=1e-9"
    )
    method, (client_id, *_) = strategy.method, strategy.roster.clients
    type_key = strategy.roster.clients[client_id].info.type_key
    digest, tensors = strategy.maps.digests[type_key], strategy.slice(type_key)
    header = Header("other", 0, method, 1)
    shared = LinearClassifier(
        np.random.default_rng(0).normal(size=(3, 2 * method.latent)).astype(np.float32),
        np.array([5.0, -5.0, 0.0], np.float32),
    )

    def ask(kind, request):
        return world.ask(0, kind, request.to_content("fp32"))

    def trained(**extra):
        request = TrainRequest(
            header,
            tensors,
            digest,
            strategy.maps.tensors[type_key],
            sorted(tensors),
            2,
            0.01,
            **extra,
        )
        return TrainReply.from_content(ask(TRAIN, request))

    alone, both = trained(), trained(discriminant=shared, class_sums=2)
    for name, value in alone.deltas.items():
        np.testing.assert_array_equal(value, both.deltas[name])
    assert alone.class_sums is None
    assert both.class_sums.counts.sum() <= 16
    measured = [
        world.ask(
            0,
            "evaluate",
            EvaluateRequest(header, tensors, digest, None, ["global"], d).to_content("fp32"),
        )
        for d in (None, shared, None)
    ]
    losses = [dict(content["metrics"])["global_loss"] for content in measured]
    assert losses[0] == losses[2] != losses[1]  # what is remembered of one is not told of the other
    wrong = replace(shared, weight=np.zeros((3, 1), np.float32))
    with pytest.raises(RemoteError, match="and 1 latents"):
        TrainReply.from_content(ask(TRAIN, TrainRequest(
            header, tensors, digest, None, [], 1, 0.01, discriminant=wrong,
            lesson=strategy.consensus.lesson(1, type_key),
        )))  # fmt: skip


def test_a_nodes_owner_must_allow_it(world):
    config = compose(str(world.path / "run.yaml"))
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(world.path)}
    assert identify(config, node).told(2) == 0
    assert identify(config, {**node, "class-sums": "no"}).told(2) == 0
    for report in ("all", "counts-and-loss-only"):
        allowed = identify(config, {**node, "report": report, "class-sums": "yes"})
        assert allowed.told(3) == 3
        assert allowed.told(1) == 2  # of one example a deployed node never tells
        assert allowed.told(0) == allowed.told(-3) == 0
    with pytest.raises(ConfigError, match=r"class-sums.*no, yes"):
        identify(config, {**node, "class-sums": "maybe"})
