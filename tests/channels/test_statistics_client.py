"""Class statistics on a client: what it tells of its classes, and where it adds the logits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from real_clients import DEEP, FEW, run
from scipy.special import log_softmax
from tiny_adapters import with_maps
from tiny_backbones import LABELS

from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.statistics.client import class_sums, classifier_logits
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import Config
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.frozen_states import bare_states
from heterotune_flwr.tuning.states import make_rows


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


def work_of(adapter, task, own):
    return SimpleNamespace(adapter=adapter, task=task, own=own, config=Config())


def test_a_share_of_it_is_in_what_is_fitted_and_nothing_on_own_examples(adapted):
    adapter, task, encoded = adapted
    rng = np.random.default_rng(0)
    shared = LinearClassifier(
        rng.normal(size=(3, adapter.method.latent)).astype(np.float32), np.zeros(3, np.float32)
    )
    whole = classifier_logits(shared, adapter, task, encoded)
    work = work_of(adapter, task, encoded)
    half = client_half("statistics")(Request(shared, 0, 0.25).to_payload(), work)
    for purpose, share in (("fit", 0.25), ("predict", 1.0), ("test", 1.0)):
        torch.testing.assert_close(half.logits(encoded, purpose), share * whole)
    assert half.logits(encoded, "train") is None
    nothing = client_half("statistics")(Request(None, 2).to_payload(), work)
    assert nothing.logits(encoded, "test") is None


def test_training_does_not_see_it(world):
    """On own examples: the same deltas with and without; the tests differ."""
    strategy = run(
        world, DEEP, rounds=1, overrides=f"{FEW} strategies.{DEEP}.statistics.weight=1e-9"
    )
    method, (client_id, *_) = strategy.method, strategy.roster.clients
    type_key = strategy.roster.clients[client_id].info.type_key
    tensors, maps = strategy.groups.slice(type_key), strategy.maps.tensors[type_key]
    run_of = {
        "values": tensors, "experiment": "other", "method": method, "maps": maps,
        "digest": strategy.maps.digests[type_key],
    }  # fmt: skip
    shared = LinearClassifier(
        np.random.default_rng(0).normal(size=(3, 2 * method.latent)).astype(np.float32),
        np.array([5.0, -5.0, 0.0], np.float32),
    )

    def trained(**channels):
        return world.train(0, 1, expected=sorted(tensors), channels=channels, **run_of)

    alone, both = trained(), trained(statistics=Request(shared, 2).to_payload())
    for name, value in alone.deltas.items():
        np.testing.assert_array_equal(value, both.deltas[name])
    assert not alone.channels
    assert ClassSums.from_payload(both.channels["statistics"]).counts.sum() <= 16
    losses = [
        world.evaluate(0, test_sets=["global"], channels=channels, **run_of)["global_loss"]
        for channels in ({}, {"statistics": Request(shared).to_payload()}, {})
    ]
    assert losses[0] == losses[2] != losses[1]  # what is remembered of one is not told of the other
    wrong = replace(shared, weight=np.zeros((3, 1), np.float32))
    predictions = next(channel for channel in strategy.channels if channel.name == "predictions")
    with pytest.raises(RemoteError, match="and 1 latents"):
        trained(
            statistics=Request(wrong).to_payload(),
            predictions=predictions.request(1, client_id, {"train"}),
        )


def test_a_nodes_owner_must_allow_it(world):
    config = compose(str(world.path / "run.yaml"))
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(world.path)}
    assert identify(config, node).allowed_min_count(2) == 0
    assert identify(config, {**node, "class-sums": "no"}).allowed_min_count(2) == 0
    for report in ("all", "counts-and-loss-only"):
        allowed = identify(config, {**node, "report": report, "class-sums": "yes"})
        assert allowed.allowed_min_count(3) == 3
        assert allowed.allowed_min_count(1) == 2  # of one example a deployed node never tells
        assert allowed.allowed_min_count(0) == allowed.allowed_min_count(-3) == 0
    with pytest.raises(ConfigError, match=r"class-sums.*no, yes"):
        identify(config, {**node, "class-sums": "maybe"})
