"""How a rate sinks over the steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import TRAINING, prepared
from tiny_backbones import LABELS

from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import FederationError
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.optimizer import rate_schedule
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task


def test_the_rate_sinks_where_there_are_no_examples(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TRAINING)
    adapter = prepared(backbone)
    texts = task.encode([Example(f"public words {n}", LABELS[0]) for n in range(4)])
    none = make_rows(adapter, task.encode([]))
    wanted = torch.eye(3)[[0, 1, 2, 0]]
    distillation = Distillation(make_rows(adapter, texts), range(4), wanted, 1.0, 4)
    before = distillation.losses(task, range(4)).mean()
    work = replace(TRAINING, local_steps=30, learning_rate=0.02)
    report = fit(adapter, task, work, [Examples(none), distillation], seed=0)
    after = distillation.losses(task, range(4)).mean()
    assert (report.examples, report.steps, report.accuracy) == (4, 30, None)
    assert after < before - 0.1
    assert after < report.loss < before
    with pytest.raises(FederationError, match="no examples to train on, and no predictions"):
        fit(adapter, task, TRAINING, [Examples(none)], seed=0)


def test_half_a_cosine_after_the_warm_up():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = rate_schedule(optimizer, 2, sinks_over=4)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    cosine = (1 + np.cos(np.pi * np.arange(4) / 4)) / 2
    np.testing.assert_allclose(rates, cosine * [0.5, 1, 1, 1])
