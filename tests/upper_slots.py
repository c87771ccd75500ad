"""Adapters of three slots of which the upper ones are trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach

METHOD = MethodConfig(slots=3, latent=8, inner=4, experts_global=2)


TRAIN = TrainConfig(batch_size=8, learning_rate=0.01)

SHORT = replace(TRAIN, local_steps=3)


def random_values(shapes, seed=0, scale=0.3, above=0):
    """Random values; the experts of slots below ``above`` give zero, as in a bank nobody trained there."""
    rng = np.random.default_rng(seed)
    values = {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    return {
        n: np.zeros_like(v) if slot_of(n) < above and n.endswith(".up.weight") else v
        for n, v in values.items()
    }


def prepared(directory, bits, lowest, above=0, method=METHOD, seed=0):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = attach(backbone, method, 3)
    adapter.train_from(lowest)
    adapter.load(random_values(adapter.shapes, seed, above=above))
    return adapter


def gradients(adapter, task, rows, indices):
    states, targets, _ = rows.rows(indices)
    losses, _ = task.losses(states, targets)
    return losses.mean().detach(), torch.autograd.grad(
        losses.mean(), list(adapter.trained.values())
    )
