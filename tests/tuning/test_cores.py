"""Cores on the linear layers of the upper blocks: what they compute, where states can be kept, who shares them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from real_clients import run
from tiny_adapters import CORES, METHOD, TRAIN, gradients, logits, random_values, with_maps
from tiny_backbones import LABELS

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.cores import first_core_block
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.lora import dense_weight, singular_vectors
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import FullRows, PrefixRows, make_rows
from heterotune_flwr.tuning.task import make_task


@pytest.mark.parametrize(
    ("share", "layers", "block"), [(0.0, 3, 0), (0.5, 30, 15), (0.99, 3, 2), (0.4, 3, 1)]
)
def test_the_first_block_with_cores(share, layers, block):
    assert first_core_block(replace(CORES, core_from=share), layers) == block
    assert first_core_block(METHOD, layers) is None


@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("slots", [1, 2])
def test_cores_start_at_nothing_and_leave_nothing(directory, bits, slots):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    detach(backbone)
    bare = logits(backbone.model)
    adapter = attach(backbone, replace(CORES, slots=slots), 3)
    cores = [name for name in adapter.shapes if name.startswith("cores.")]
    assert len(cores) == 7 * 2  # named alike whatever else is attached
    assert "cores.model.layers.2.mlp.down_proj.R" in cores
    adapter.load({n: np.zeros(s, np.float32) for n, s in adapter.shapes.items()})
    torch.testing.assert_close(logits(adapter.model), bare, rtol=0, atol=0)
    with_maps(adapter)
    assert not torch.equal(logits(adapter.model), bare)
    detach(backbone)
    torch.testing.assert_close(logits(backbone.model), bare, rtol=0, atol=0)


def test_a_core_adds_the_change_its_formula_says(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    detach(backbone)
    adapter = attach(backbone, CORES, 3)
    values = {
        n: v if n.startswith("cores.") else np.zeros_like(v)
        for n, v in random_values(adapter.shapes).items()
    }
    adapter.load(values)
    found = logits(adapter.model)
    detach(backbone)
    changes = {}
    for name, value in values.items():
        if name.startswith("cores."):
            layer = backbone.model.get_submodule(name.removeprefix("cores.").removesuffix(".R"))
            left, right = singular_vectors(dense_weight(layer), 4)
            changes[layer] = 2.0 * left @ torch.from_numpy(value).to(left) @ right
    try:
        for layer, change in changes.items():
            layer.weight.data += change
        torch.testing.assert_close(found, logits(backbone.model), rtol=1e-3, atol=1e-3)
    finally:
        for layer, change in changes.items():
            layer.weight.data -= change


@pytest.mark.parametrize("bits", ["nf4", "bf16"])
def test_states_below_the_first_core_are_kept_and_change_nothing(directory, data, bits):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    task = make_task(backbone, data, list(LABELS), TRAIN)
    adapter = with_maps(attach(backbone, CORES, 3))
    encoded = task.encode(training_pool(data)[:6])
    kept, full = make_rows(adapter, encoded), make_rows(adapter, encoded, cache=False)
    assert isinstance(kept, PrefixRows)
    assert type(full) is FullRows
    for indices in ([0, 3], [5]):
        one, two = gradients(adapter, task, kept, indices), gradients(adapter, task, full, indices)
        # A GPU multiplies one row by 4-bit weights with another kernel than many.
        loose = 10 if bits == "nf4" and backbone.device.type == "cuda" else 1
        torch.testing.assert_close(one, two, rtol=2e-2 * loose, atol=2e-3 * loose)
    before = adapter.read()
    fit(adapter, task, replace(TRAIN, local_steps=2), [Examples(kept)], seed=0)
    moved = {n for n, v in adapter.read().items() if not np.array_equal(v, before[n])}
    assert moved == set(adapter.shapes)


def test_cores_below_a_client_that_trains_the_last_slot_act_and_stay(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    task = make_task(backbone, data, list(LABELS), TRAIN)
    adapter = with_maps(attach(backbone, replace(CORES, slots=2), 3))
    adapter.train_from(1)
    encoded = task.encode(training_pool(data)[:6])
    kept, full = make_rows(adapter, encoded), make_rows(adapter, encoded, cache=False)
    torch.testing.assert_close(kept.rows([0, 4])[0], full.rows([0, 4])[0], rtol=2e-2, atol=2e-2)
    assert adapter.frozen_digest()
    assert not any(name.startswith("cores.") for name in adapter.trained)
    adapter.train_from(0)


def test_cores_are_shared_inside_a_type_the_bank_by_all(world):
    strategy = run(world, "heterotune", overrides="method.core_rank=2 method.core_from=0.6")
    cores = {g: [n for n in t if n.startswith("cores.")] for g, t in strategy.state.items()}
    assert not cores["global"]
    assert all(len(names) == 14 for group, names in cores.items() if group != "global")
    assert any(n.startswith("slots.") for n in strategy.state["global"])


def test_lora_cores_are_lora(directory, data):
    """Both factors, first values as LoRA's, the change ``scale B A``, kept states below, both trained."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    detach(backbone)
    method = replace(CORES, core_kind="lora")
    adapter = attach(backbone, method, 3)
    name = "cores.model.layers.2.mlp.down_proj"
    layer = backbone.model.get_submodule(name.removeprefix("cores."))
    assert adapter.shapes[f"{name}.A"] == (4, layer.in_features)
    assert adapter.shapes[f"{name}.B"] == (layer.out_features, 4)
    first = initial_tensors(adapter.shapes, 0)
    assert first[f"{name}.A"].any()
    assert not first[f"{name}.B"].any()
    values = {n: np.zeros_like(v) for n, v in first.items()}
    rng = np.random.default_rng(0)
    for part in "AB":
        shape = adapter.shapes[f"{name}.{part}"]
        values[f"{name}.{part}"] = rng.normal(size=shape).astype(np.float32) / 4
    adapter.load(values)
    found = logits(adapter.model)
    task = make_task(backbone, data, list(LABELS), TRAIN)
    kept = make_rows(adapter, task.encode(training_pool(data)[:6]))
    assert isinstance(kept, PrefixRows)
    fit(adapter, task, replace(TRAIN, local_steps=2), [Examples(kept)], seed=0)
    after = adapter.read()
    assert all(not np.array_equal(after[f"{name}.{p}"], values[f"{name}.{p}"]) for p in "AB")
    detach(backbone)
    change = 2.0 * torch.from_numpy(values[f"{name}.B"] @ values[f"{name}.A"]).to(backbone.device)
    layer.weight.data += change
    try:
        torch.testing.assert_close(found, logits(backbone.model), rtol=1e-3, atol=1e-3)
    finally:
        layer.weight.data -= change


@pytest.mark.parametrize("name", ["heterotune", "within_type"])
def test_private_cores_never_travel(world, name):
    words = "method.core_rank=2 method.core_kind=lora method.core_scope=client"
    strategy = run(world, name, overrides=words)
    shared = [n for tensors in strategy.state.values() for n in tensors]
    assert shared
    assert not any(n.startswith("cores.") for n in shared)
    assert strategy.models_differ
    kept = [world.state(client, strategy.context.experiment) for client in range(4)]
    ups = [n for n in kept[0] if n.startswith("cores.") and n.endswith(".B")]
    assert ups
    assert any(not np.array_equal(kept[0][n], kept[2][n]) for n in ups)  # of one type


def test_wrong_settings_get_one_clear_line():
    with pytest.raises(ConfigError, match=r"core_from is 1\.0; a number of at least 0 and below 1"):
        compose("quick", "method.core_from=1.0")
    with pytest.raises(ConfigError, match="core_rank is -1"):
        compose("quick", "method.core_rank=-1")
