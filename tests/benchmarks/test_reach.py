"""Mixtures of experts at work, their answers, and what a table of them counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_adapters import METHOD, loaded, random_values
from tiny_backbones import TEXTS

from benchmarks.science.laboratory.mixtures import acting, answers_of, mixture
from benchmarks.science.reach import ROWS, summary
from heterotune_flwr.data.examples import Example
from heterotune_flwr.schema import DataConfig, TrainConfig
from heterotune_flwr.tuning.generation import answer_prompts, generate_answers
from heterotune_flwr.tuning.task import make_task

DATA = DataConfig(prompt="{text} ->", max_labels=0, max_answer_tokens=6, max_length=48)


@pytest.fixture
def adapter(directory):
    return loaded(directory, METHOD)


def test_a_mixture_adds_what_its_experts_add_by_their_weights(adapter):
    states = torch.randn(5, adapter.backbone.hidden)
    one, other = (random_values(adapter.shapes, seed) for seed in (1, 2))
    experts = [acting(adapter, values) for values in (one, other)]
    moved = []
    for values in (one, other):
        adapter.load(values)
        moved.append(adapter.last_slot(states) - states)
    assert not torch.allclose(*moved)
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    wanted = 0.5 * moved[0] + 0.25 * moved[1]
    for given in (weights, (0.5, 0.25), lambda added: torch.tensor([0.5, 0.25]).expand(5, 2)):
        found = mixture(experts, given)(states)
        assert torch.allclose(found, wanted, atol=1e-5)
    mixture(experts, weights)(states).sum().backward()
    assert weights.grad.tolist() == pytest.approx([each.sum().item() for each in moved], rel=1e-3)
    with mixture([], ()).at_work(adapter):
        assert torch.equal(adapter.last_slot(states), states)
    assert torch.allclose(adapter.last_slot(states) - states, moved[1], atol=1e-6)


def test_answers_of_mixtures_are_those_of_each_by_itself(adapter):
    task = make_task(adapter.backbone, DATA, None, TrainConfig(loss="tokens"))
    examples = [
        Example(text, "red") for text in [*TEXTS, "a much longer text than those before it"]
    ]
    one, other = (random_values(adapter.shapes, seed, scale=1.0) for seed in (1, 2))
    three = [mixture([acting(adapter, values)], (w,)) for values, w in ((one, 1), (other, 1), (one, 0))]  # fmt: skip
    found = answers_of(adapter, task, three, examples, DATA)
    prompts = answer_prompts(task, examples, DATA)
    for values, answers in zip(
        (one, other, {n: np.zeros_like(v) for n, v in one.items()}), found, strict=True
    ):
        adapter.load(values)
        form = task.form
        assert answers == generate_answers(adapter, prompts, 6, form.stop, form.ending)
    assert found[0] != found[1]


def client(loss: float, score: float = 50.0):
    means = {m: dict.fromkeys(ROWS, v) for m, v in (("loss", 2.0), ("score", 50.0))}
    means["loss"]["gate"], means["score"]["gate"] = loss, score
    pair = {"loss": [2.0 - loss, 0.01], "score": [(score - 50) / 100, 0.01]}
    gain = {f"{row} {other}": {"loss": [0.0, 0.01], "score": [0.0, 0.01]}
            for row in ROWS for other in ("bare", "alone") if row != other}  # fmt: skip
    return {"type": "a@bf16", "took": "alone", "own": means, "all": means,
            "gain": gain | {f"gate {other}": pair for other in ("bare", "alone")},
            "weights": {"gate": [0.2, 0.4, 0.0, 1.0], "gate_alone": [0.5]}}  # fmt: skip


def test_a_row_is_told_by_its_gain_over_the_switch_and_whom_it_harms():
    found = summary({"chat 20": {"a": client(1.0), "b": client(1.5)}, "chat 21": {"a": client(1.1, 40.0)}})  # fmt: skip
    row = found["chat"]["own"]["gate"]
    assert found["all"]["own"]["gate"] == row
    assert row["loss"] == 1.2
    assert row["loss_gain"]["gain"] == 0.8
    assert row["score_gain"]["gain"] == pytest.approx(-3.333, abs=1e-3)
    assert row["loss_gain"]["low"] > 0
    assert row["weights"] == [0.2, 0.4]
    assert row["worse_than_bare"] == row["worse_than_alone"] == ["chat 21 a"]
    assert found["chat"]["own"]["switch"]["worse_than_bare"] == []
    assert "loss_gain" not in found["chat"]["own"]["switch"]
    assert (found["chat"]["took"], found["seeds"]) == ({"bare": 0, "alone": 3, "federated": 0}, [20, 21])  # fmt: skip
