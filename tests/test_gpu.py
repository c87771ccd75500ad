"""What holds on a GPU and nowhere else: ``HETEROTUNE_TESTS_ON=gpu pytest -m gpu``; without ``-m gpu``, everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import CORES, prepared, prompts_of, random_values, with_maps
from tiny_backbones import LABELS

from heterotune_flwr.backbones.loading import BackboneSpec, clear_backbones, load_backbone
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import generate_answers
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.memory import forget_peak, peak_memory_mb
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and HETEROTUNE_TESTS_ON=gpu"
    ),
]
DEEP = MethodConfig(latent=8, inner=4, slots=3, experts_global=2)
TRAIN = TrainConfig(batch_size=4, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _exact():
    """No TensorFloat-32: the CPU has none."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    clear_backbones()


def with_values(backbone, method):
    """An adapter that changes every logit, with random maps where it has any.

    LoRA in small values: large ones saturate attention, and what AdamW makes of a gradient that is all rounding
    differs between any two orders of summation.
    """
    if method is CORES:
        return with_maps(attach(backbone, method, 3))
    adapter = prepared(backbone, method)
    if method.kind == "lora":
        adapter.load(random_values(adapter.shapes, scale=0.06))
    return adapter


@pytest.mark.parametrize("method", [DEEP, CORES, MethodConfig(kind="lora", lora_rank=2)])
@pytest.mark.parametrize("kept", [True, False])
def test_training_there_is_training_here(directory, data, method, kept):
    """The same client, seed and values: after six steps the same adapter, to rounding."""
    after = {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone(BackboneSpec(str(directory), "fp32"), device)
        task = make_task(backbone, data, list(LABELS), TRAIN)
        adapter = with_values(backbone, method)
        rows = make_rows(adapter, task.encode(training_pool(data)[:12]), cache=kept)
        before = adapter.read()
        fit(adapter, task, replace(TRAIN, local_steps=6), [Examples(rows)], seed=0)
        after[device] = adapter.read()
    whole = {
        d: np.concatenate([after[d][n].ravel() - before[n].ravel() for n in before]) for d in after
    }
    moved = float(np.linalg.norm(whole["cpu"]))
    assert moved > 0.05
    assert np.linalg.norm(whole["cuda"] - whole["cpu"]) < 0.01 * moved


@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16"])
def test_a_quantized_client_learns_within_its_memory(directory, data, bits):
    backbone = load_backbone(BackboneSpec(str(directory), bits), "cuda")
    assert backbone.device.type == "cuda"
    config = replace(TRAIN, gradient_checkpointing=True, local_steps=15)
    task = make_task(backbone, data, list(LABELS), config)
    adapter = with_values(backbone, CORES)
    rows = make_rows(adapter, task.encode(training_pool(data)), cache=False)
    forget_peak(backbone.device)
    losses = [
        fit(adapter, task, config, [Examples(rows)], seed=s, memory_gb=1.0).loss for s in range(3)
    ]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < peak_memory_mb(backbone.device) < 1000


def test_answers_there_are_answers_here(directory):
    found = {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone(BackboneSpec(str(directory), "fp32"), device)
        adapter = prepared(backbone, DEEP)
        found[device] = generate_answers(adapter, prompts_of(backbone.tokenizer), 8, None)
    assert found["cpu"] == found["cuda"]
    assert any(found["cpu"])
