"""Adapters with random values on tiny backbones, and what their gradients are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tiny_backbones import LABELS, TEXTS

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.task import make_task

METHOD = MethodConfig(latent=8, inner=4, experts_global=2)


LORA = MethodConfig(kind="lora", lora_rank=2)


TRAIN = TrainConfig(batch_size=4, learning_rate=0.01)
TRAINING = replace(TRAIN, local_steps=3)


def random_values(shapes, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def prepared(backbone, method=METHOD, output=3, seed=0):
    """An attached adapter with random values in all its tensors, so that it changes every logit."""
    adapter = attach(backbone, method, output)
    adapter.load(random_values(adapter.shapes, seed))
    return adapter


def gradients(adapter, task, rows, indices):
    states, targets, _ = rows.rows(indices)
    losses, _ = task.losses(states, targets)
    loss = losses.mean()
    return loss.detach(), torch.autograd.grad(loss, list(adapter.parameters.values()))


CORES = replace(METHOD, core_rank=4, core_from=0.4, core_scale=2.0)  # blocks 1 and 2 of 3


def with_maps(adapter):
    """Random values in all tensors and maps."""
    adapter.load(random_values(adapter.shapes))
    from heterotune_flwr.dema import read_maps

    rng = np.random.default_rng(5)
    maps = {
        n: rng.normal(size=v.shape).astype(np.float32) / 6
        for n, v in read_maps(adapter.model).items()
    }
    adapter.load_maps(maps)
    return adapter


IDS = torch.tensor([[4, 9, 30, 7, 12]])


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float()


def prompts_of(tokenizer):
    return [list(tokenizer(text)["input_ids"]) for text in [*TEXTS, "red", "slow song"]]


def loaded(directory, method, bits="fp32"):
    """A tiny backbone with an adapter that changes every logit, maps included."""
    adapter = attach(load_backbone(BackboneSpec(str(directory), bits)), method, 3)
    if method.kind == "dema":
        return with_maps(adapter)
    adapter.load(random_values(adapter.shapes))
    return adapter


def adapted_task(directory, data):
    """A model with random values in its bank and cores, its task, and some examples."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TrainConfig())
    adapter = with_maps(attach(backbone, replace(CORES, output=3), 3))
    return adapter, task, task.encode(training_pool(data)[:13])


def maps_of(adapter):
    """The maps it works with, by name."""
    from heterotune_flwr.dema import read_maps

    return read_maps(adapter.model)
