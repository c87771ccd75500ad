"""The laboratory gives the product's numbers: its batched training against DeMA's layer and torch's AdamW."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.science.laboratory.clients import (
    LatentTask,
    Schedule,
    initial_bank,
    latent_task,
    mixture,
)
from benchmarks.science.laboratory.consensus import Lessons
from benchmarks.science.laboratory.federation import Groups, aggregate, federate
from benchmarks.science.laboratory.rows import read_out, table_row
from heterotune_flwr.channels.predictions.options import PredictionOptions
from heterotune_flwr.channels.predictions.server import sinkhorn_balance
from heterotune_flwr.dema.config import DeMAConfig
from heterotune_flwr.dema.layer import DeMALayer
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.optimizer import make_optimizer

METHOD = MethodConfig(latent=6, inner=4, experts_global=3)
HIDDEN, LABELS, POOL = 10, 3, 40


def world(seed: int = 0, types: int = 2) -> tuple[list[LatentTask], list[DeMALayer], list[torch.Tensor],
                                                  list[torch.Tensor], torch.Tensor]:  # fmt: skip
    """Types with random maps, as the laboratory and as the product see them."""
    rng = np.random.default_rng(seed)
    targets = torch.from_numpy(rng.integers(0, LABELS, POOL))
    tasks, layers, states, rows = [], [], [], []
    for kind in range(types):
        config = DeMAConfig(slots=1, latent=6, inner=4, output=LABELS, experts_global=3, seed=7)
        layer = DeMALayer(nn.Identity(), "default", config, 0, HIDDEN)
        maps = layer.dema_maps["default"]
        with torch.no_grad():
            maps.down_bias.copy_(torch.randn(6, generator=torch.Generator().manual_seed(kind)))
        x = rng.standard_normal((POOL, HIDDEN)).astype(np.float32)
        x[:, 0] += targets.numpy()
        head = rng.standard_normal((LABELS, HIDDEN)).astype(np.float32)
        named = {
            "slots.0.map.down.weight": maps.down_weight.numpy(),
            "slots.0.map.down.bias": maps.down_bias.numpy(),
            "slots.0.map.up.weight": maps.up_weight.numpy(),
        }
        tasks.append(latent_task(named, head, x, x, x))
        layers.append(layer)
        states.append(torch.from_numpy(x))
        rows.append(torch.from_numpy(head))
    return tasks, layers, states, rows, targets


def test_the_batched_mixture_is_demas_layer():
    tasks, layers, states, rows, _ = world()
    for task, layer, x, head in zip(tasks, layers, states, rows, strict=True):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in layer.trainable("default").values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        experts = layer.experts("default")
        bank = {
            "down": torch.stack([e.down.weight for e in experts]),
            "bias": torch.stack([e.down.bias for e in experts]),
            "up": torch.stack([e.up.weight for e in experts]),
            "gate": layer.dema_gate["default"].weight,
            "gate_bias": layer.dema_gate["default"].bias,
        }
        bank = {key: value.detach()[None] for key, value in bank.items()}
        expected = layer(x) @ head.T
        found = task.pool_logits + mixture(bank, task.pool_z[None])[0] @ task.effect.T
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_the_first_values_are_the_products():
    _, layers, *_ = world()
    bank = initial_bank(METHOD, LABELS, 7)
    experts = layers[0].experts("default")
    torch.testing.assert_close(bank["down"][2], experts[2].down.weight.detach())
    assert bank["up"].shape == (3, LABELS, 4)
    assert not bank["up"].any()


def train_naively(layer: DeMALayer, x: torch.Tensor, head: torch.Tensor, y: torch.Tensor, share: list[int],
                  orders: list[torch.Tensor], schedule: Schedule) -> list[torch.Tensor]:  # fmt: skip
    """The product's loop: layer, AdamW, clipping; returns the final parameters."""
    layer.reset("default")
    counts = torch.bincount(y[share], minlength=LABELS) + schedule.smoothing
    prior = schedule.adjustment * torch.log(
        counts / len(share) / (1 + LABELS * schedule.smoothing / len(share))
    )
    trained = {
        f"slots.0.{'gate' if 'gate' in name else 'experts.global.0'}.{name}": value
        for name, value in layer.trainable("default").items()
    }
    parameters = list(trained.values())
    work = TrainConfig(gate_rate=schedule.gate_rate, learning_rate=schedule.rates[0])
    for order in orders:
        optimizer = make_optimizer(trained, work)
        for step in range(schedule.steps):
            picked = torch.tensor(share)[order[step * schedule.batch : (step + 1) * schedule.batch]]
            loss = functional.cross_entropy(layer(x[picked]) @ head.T + prior, y[picked])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
    return parameters


def test_training_alone_equals_the_products_loop(monkeypatch: pytest.MonkeyPatch):
    tasks, layers, states, rows, targets = world()
    schedule = Schedule(rounds=3, steps=4, batch=4, rates=(0.03,), clip=0.5, gate_rate=0.3)
    shares = [list(range(0, 16)), list(range(20, 36))]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(2, 1, 16, generator=generator).argsort(-1).flatten(1) for _ in range(3)]
    kept = {}
    monkeypatch.setattr(
        "benchmarks.science.laboratory.federation.accuracies",
        lambda bank, *_: kept.update(bank) or np.zeros(2),
    )
    federate(tasks, (targets, targets), shares, 2, [7], METHOD, schedule, ("alone",))
    for client in range(2):
        orders = [order[client] for order in drawn]
        train_naively(
            layers[client], states[client], rows[client], targets, shares[client], orders, schedule
        )
        experts = layers[client].experts("default")
        ups = torch.stack([e.up.weight for e in experts]).detach()
        assert ups.abs().max() > 0.01
        torch.testing.assert_close(kept["up"][client], ups, atol=2e-4, rtol=1e-3)
        gate = layers[client].dema_gate["default"].weight.detach()
        torch.testing.assert_close(kept["gate"][client], gate, atol=2e-4, rtol=1e-3)


def grouped(scope: str) -> Groups:
    """Two types of two clients in one run, under every sharing: 12 clients."""
    sharing = torch.tensor([0, 1, 2]).repeat_interleave(4)
    types = torch.tensor([0, 1, 0, 1]).repeat(3)
    return Groups.of(sharing, torch.zeros(12, dtype=torch.long), types, scope)


def test_sharing_averages_exactly_the_right_clients():
    start = {"up": torch.zeros(12, 1), "gate": torch.zeros(12, 1)}
    end = {key: torch.tensor([1.0, 10, 3, 30] * 3)[:, None] for key in start}
    new = aggregate(start, end, grouped("global"))
    expected = [1, 10, 3, 30, 2, 20, 2, 20, 11, 11, 11, 11]
    assert new["up"].flatten().tolist() == pytest.approx(expected)
    assert new["gate"].flatten().tolist() == pytest.approx(expected)
    new = aggregate(start, end, grouped("type"))
    assert new["up"].flatten().tolist() == pytest.approx(expected)
    assert new["gate"].flatten().tolist() == pytest.approx([*expected[:8], 2, 20, 2, 20])
    new = aggregate(start, end, grouped("client"))
    assert new["gate"].flatten().tolist() == pytest.approx([1, 10, 3, 30] * 3)


def test_sharing_helps_when_types_see_the_same_and_not_when_they_do_not():
    """The whole laboratory on a planted task: one type's data is useless to the other unless aligned."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, LABELS, 400))
    z = torch.from_numpy(rng.standard_normal((400, 6)).astype(np.float32))
    z[torch.arange(400), labels] += 2.0
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    blank, effect = torch.zeros(400, LABELS), torch.eye(LABELS)
    same = LatentTask(z, blank, z, blank, effect, z, blank)
    turned = LatentTask(z @ turn, blank, z @ turn, blank, effect, z @ turn, blank)
    shares = [list(range(20)), list(range(20, 40))] * 3
    schedule = Schedule(rounds=8, steps=5, batch=8, rates=(0.02,))
    gains = {}
    for name, other in (("same", same), ("turned", turned)):
        found = federate([same, other], (labels, labels), shares, 2, [1, 2, 3], METHOD, schedule)
        np.testing.assert_array_equal(found["alone"], found["within"])  # one client of each type
        gains[name] = (found["across"] - found["within"]).mean()
    assert gains["same"] > 1.0
    assert gains["same"] > gains["turned"] + 2.0


def test_in_the_type_phase_predictions_teach_clients_and_guests_without_data():
    """A guest that sees the world turned has no use for the bank, and learns from what the others say."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, LABELS, 400))
    z = torch.from_numpy(rng.standard_normal((400, 6)).astype(np.float32))
    z[torch.arange(400), labels] += 2.0
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    blank, effect = torch.zeros(400, LABELS), torch.eye(LABELS)
    own = LatentTask(z, blank, z, blank, effect, z, blank)
    guest = LatentTask(z @ turn, blank, z @ turn, blank, effect, z @ turn, blank)
    shares = [list(range(20)), list(range(20, 40))] * 3
    schedule = Schedule(rounds=8, steps=5, batch=8, rates=(0.02,))
    found = {}
    for phase in (0.0, 0.5):
        found[phase] = federate(
            [own, own], (labels, labels), shares, 2, [1, 2, 3], METHOD,
            replace(schedule, personalization_phase=phase), guests=[guest],
        )  # fmt: skip
    for sharing in ("alone", "within"):  # nobody teaches them
        np.testing.assert_array_equal(found[0.0][sharing], found[0.5][sharing])
    assert (found[0.0]["across"] != found[0.5]["across"]).any()
    assert found[0.5]["guests"].mean() > found[0.0]["guests"].mean() + 5


def test_lessons_hold_each_runs_mean_prediction_balanced():
    tasks, *_ = world()
    banks = {
        key: torch.stack([value] * 4) for key, value in initial_bank(METHOD, LABELS, 7).items()
    }
    kinds, runs = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    options = PredictionOptions(
        anchors=POOL, pool=POOL, batch=5, agreement_power=0, entropy_power=0, balance=3
    )
    lessons = Lessons(tasks, kinds, runs, options)
    lessons.aggregate(banks)
    drawn = lessons.chosen
    said = [torch.softmax(tasks[kind].anchors_logits[drawn], -1) for kind in (0, 1)]
    mean = torch.stack(said).mean(0).double().numpy()
    for run in (0, 1):  # the bank's output starts at 0: everybody says what its backbone says
        np.testing.assert_allclose(lessons.targets[run], sinkhorn_balance(mean, 3), atol=1e-5)


def test_read_out_learns_a_separable_task():
    y = torch.arange(60) % 3
    z = torch.eye(3)[y] * 5 + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    weights, bias = read_out(z, y)
    assert ((z @ weights + bias).argmax(1) == y).all()


def test_table_rows_pair_over_seeds():
    across = np.array([[30.0, 40.0], [50.0, 60.0]])
    found = {
        "alone": across - 10,
        "within": across - np.array([[4.0, 2.0], [6.0, 4.0]]),
        "across": across,
    }
    slow = {
        key: value - 20 for key, value in found.items()
    }  # every sharing prefers the second rate
    both = {key: np.stack([slow[key], found[key]]) for key in found}
    row = table_row(both, ["x", "y"], (0.1, 0.2))
    assert row["gain_over_within"] == 4.0
    assert row["by_rate"]["within"]["0.1"] == row["within"] - 20
    assert row["gain_over_within_se"] == 1.0
    assert row["types"]["y"]["across"] == 50.0
    assert row["clients_helped"] == 1.0
