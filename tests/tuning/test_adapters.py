"""Adapters on tiny random backbones: they start at nothing, replace each other, and must be loaded whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import LORA, METHOD, maps_of, prepared, random_values

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.tuning.adapters import attach, detach


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, slots=2), LORA])
@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16"])
def test_a_new_adapter_leaves_the_backbone_as_it_is(directory, bits, method):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    ids = torch.tensor([[4, 9, 30, 7]], device=backbone.device)
    with torch.no_grad():
        bare = backbone.model(ids).logits
    adapter = attach(backbone, method, 3)
    assert attach(backbone, method, 3) is adapter
    assert all(value.dtype == torch.float32 for value in adapter.parameters.values())
    if method.kind == "dema":
        assert adapter.shapes == bank_shapes(method, 3)
    else:
        assert len(adapter.shapes) == 2 * 7 * 3
        assert adapter.shapes["lora.model.layers.2.mlp.down_proj.A"] == (2, 64)
        assert adapter.shapes["lora.model.layers.2.mlp.down_proj.B"] == (32, 2)
    adapter.load(initial_tensors(adapter.shapes, seed=5))
    with torch.no_grad():
        assert torch.equal(adapter.model(ids).logits, bare)
    adapter.load(random_values(adapter.shapes))
    with torch.no_grad():
        assert not torch.equal(adapter.model(ids).logits, bare)
    detach(backbone)
    with torch.no_grad():
        assert torch.equal(backbone.model(ids).logits, bare)


def test_adapters_replace_each_other_on_one_backbone(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    ids = torch.tensor([[4, 9, 30, 7]], device=backbone.device)
    first = prepared(backbone)
    with torch.no_grad():
        before = first.model(ids).logits
    values, maps = first.read(), dict(maps_of(first))
    assert set(prepared(backbone, LORA).parameters).isdisjoint(first.parameters)
    again = attach(backbone, METHOD, 3)
    assert again is not first
    again.load(values)
    again.load_maps(maps)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, before)


def test_loading_must_be_complete_and_fit(directory):
    adapter = attach(load_backbone(BackboneSpec(str(directory), "fp32")), METHOD, 3)
    values = random_values(adapter.shapes)
    adapter.load(values)
    assert all(np.array_equal(adapter.read()[name], values[name]) for name in values)
    gate = values.pop("slots.0.gate.bias")
    with pytest.raises(ExchangeError, match=r"missing \['slots\.0\.gate\.bias'\]"):
        adapter.load(values)
    with pytest.raises(ExchangeError, match="expects"):
        adapter.load({**values, "slots.0.gate.bias": gate[:1]})
    with pytest.raises(ExchangeError, match="the maps sent do not fit"):
        adapter.load_maps({"slots.0.map.down.weight": np.zeros((8, 32), np.float32)})
    with pytest.raises(ConfigError, match=r"method\.kind"):
        attach(adapter.backbone, replace(METHOD, kind="adapter"), 3)
