"""One slot against the naive formula: gates, experts, activation, dtypes, maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dema_models import (
    HIDDEN,
    dema_config,
    naive_delta,
    randomize,
    snapshot,
    tiny_model,
    tokens,
)
from peft import get_peft_model

from heterotune_flwr.dema import (
    DeMAConfig,
    DeMALayer,
    load_maps,
    read_maps,
    trainable_tensors,
)
from heterotune_flwr.dema.access import slot_layers
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.schema import MethodConfig

MAPS = ("down.weight", "down.bias", "up.weight")


def one_slot(config: DeMAConfig) -> DeMALayer:
    layer = DeMALayer(torch.nn.LayerNorm(HIDDEN), "default", config, config.slots - 1, HIDDEN)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.trainable("default").values():
            parameter.normal_()
    return layer.eval()


def values_of(layer: DeMALayer) -> tuple[dict[str, Any], dict[str, Any]]:
    values = {name: p.detach().numpy() for name, p in layer.trainable("default").items()}
    maps = layer.dema_maps["default"]
    slot = f"slots.{layer.slots['default']}.map"
    return values, {
        f"{slot}.down.weight": maps.down_weight.numpy(),
        f"{slot}.down.bias": maps.down_bias.numpy(),
        f"{slot}.up.weight": maps.up_weight.numpy(),
    }


@pytest.mark.parametrize("gate", ["dense", "uniform"])
@pytest.mark.parametrize("activation", ["silu", "linear"])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_formula(gate: str, activation: str, experts: int) -> None:
    config = dema_config(gate=gate, activation=activation, slots=1, experts_global=experts)
    layer = one_slot(config)
    layer.dema_maps["default"].down_bias.normal_()
    x = torch.randn(2, 5, HIDDEN)
    values, maps = values_of(layer)
    expected = naive_delta(x.numpy(), 0, config, values, maps)
    np.testing.assert_allclose(layer.delta("default", x).detach(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("gate", ["dense", "uniform"])
def test_experts_without_an_inner_layer_are_a_matrix_and_a_bias(gate: str) -> None:
    """y = f(x) + U (P (D x + o) + Q): Co-LoRA, and a mixture of such."""
    config = dema_config(gate=gate, slots=1, inner=0)
    layer = one_slot(config)
    layer.dema_maps["default"].down_bias.normal_()
    x = torch.randn(2, 5, HIDDEN)
    values, maps = values_of(layer)
    experts = {n for n in values if ".experts." in n}
    assert {n.rsplit(".", 2)[1] for n in experts} == {"up"}
    expected = naive_delta(x.numpy(), 0, config, values, maps)
    np.testing.assert_allclose(layer.delta("default", x).detach(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_one_linear_expert_is_a_plain_core() -> None:
    """E=1, linear: y = f(x) + U C (D x + o), the r x r core of Fed-SB / Co-LoRA."""
    config = dema_config(slots=1, experts_global=1, activation="linear", inner=8)
    layer = one_slot(config)
    (expert,) = layer.experts("default")
    assert expert.down is not None
    with torch.no_grad():
        expert.down.bias.zero_()
    core = expert.up.weight @ expert.down.weight
    maps = layer.dema_maps["default"]
    x = torch.randn(4, HIDDEN)
    expected = x @ maps.down_weight.T @ core.T @ maps.up_weight.T
    torch.testing.assert_close(layer.delta("default", x), expected, rtol=1e-4, atol=1e-5)


def test_a_gates_rows_weigh_the_experts_in_their_order() -> None:
    layer = one_slot(dema_config(slots=1))
    gate = layer.dema_gate["default"]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([0.0, 60.0, 0.0]))
    x = torch.randn(3, HIDDEN)
    chosen = layer.experts("default")[1](layer.latents(x))
    expected = chosen @ layer.dema_maps["default"].up_weight.T
    torch.testing.assert_close(layer.delta("default", x), expected)


def test_uniform_gate_is_not_trained_but_has_gradients() -> None:
    layer = one_slot(dema_config(slots=1, gate="uniform"))
    layer.delta("default", torch.randn(2, HIDDEN)).sum().backward()
    gate = layer.dema_gate["default"]
    assert gate.weight.grad is not None
    assert not gate.weight.grad.any()


def test_bf16_states_keep_their_dtype_and_float32_math() -> None:
    layer = one_slot(dema_config(slots=1))
    x = torch.randn(4, HIDDEN).bfloat16()
    result = layer.add_delta(x, x)
    assert result.dtype == torch.bfloat16
    expected = (x.float() + layer.delta("default", x.float())).bfloat16()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_autocast_does_not_lower_the_adapter() -> None:
    layer = one_slot(dema_config(slots=1))
    x = torch.randn(4, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.delta("default", x)
    torch.testing.assert_close(inside, layer.delta("default", x), rtol=0, atol=0)


def test_keyword_states_and_tuple_outputs() -> None:
    """Blocks may call their MLP with keywords; mixture-of-experts blocks return tuples."""

    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> Any:
            return scale * hidden_states, "router"

    config = dema_config(slots=2)
    layer = DeMALayer(Block(), "default", config, 0, HIDDEN)
    with torch.no_grad():
        for parameter in layer.trainable("default").values():
            parameter.normal_()
    x = torch.randn(3, HIDDEN)
    result, router = layer(hidden_states=x, scale=2.0)
    assert router == "router"
    torch.testing.assert_close(result, 2 * x + layer.delta("default", x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_slot_alone_equals_the_full_forward(dtype: torch.dtype) -> None:
    """Bit for bit on the same rows; on a part of them, but for the matrix product's own rounding."""
    bare = tiny_model().to(dtype)
    ids = tokens()
    with torch.no_grad():
        frozen = bare.model(ids).last_hidden_state
    model = get_peft_model(bare, dema_config(slots=1)).eval()
    randomize(model)
    with torch.no_grad():
        full = model.get_base_model().model(ids).last_hidden_state
        slot = slot_layers(model)[-1]
        kept = slot.add_delta(frozen, frozen)
        last = slot.add_delta(frozen[:, -1], frozen[:, -1])
    assert not torch.equal(frozen, full)
    assert torch.equal(full, kept)
    one_unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(last, full[:, -1], rtol=one_unit, atol=1e-5)


def test_canonical_tensors_are_the_bank() -> None:
    config = dema_config()
    model = get_peft_model(tiny_model(), config)
    shapes = bank_shapes(config, output=6)
    found = trainable_tensors(model)
    assert {name: tuple(p.shape) for name, p in found.items()} == shapes
    for name, value in initial_tensors(shapes, config.seed).items():
        np.testing.assert_array_equal(found[name].detach().numpy(), value)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in found.values()}
    assert all(p.dtype == torch.float32 for p in trainable)


def test_load_and_read_back() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    values = randomize(model)
    rng = np.random.default_rng(5)
    maps = {n: rng.standard_normal(m.shape).astype(np.float32) for n, m in read_maps(model).items()}
    load_maps(model, maps)
    now, maps_now = snapshot(model)
    for name, value in values.items():
        np.testing.assert_array_equal(now[name], value)
    assert set(maps_now) == {f"slots.{k}.map.{m}" for k in (0, 1) for m in MAPS}
    for name, value in maps.items():
        np.testing.assert_array_equal(maps_now[name], value)


def test_wrong_maps_change_nothing() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    before = read_maps(model)
    good = np.ones(8, dtype=np.float32)
    with pytest.raises(ExchangeError, match=r"no map 'slots.7.map.down.bias'"):
        load_maps(model, {"slots.0.map.down.bias": good, "slots.7.map.down.bias": good})
    with pytest.raises(ExchangeError, match=r"has shape \(3,\), the model expects \(8,\)"):
        load_maps(model, {"slots.0.map.down.bias": good, "slots.1.map.down.bias": good[:3]})
    with pytest.raises(ExchangeError, match="no map"):
        load_maps(model, {"slots.0.gate.bias": good})
    after = read_maps(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_maps_are_frozen_seeded_and_differ_per_slot() -> None:
    first = read_maps(get_peft_model(tiny_model(), dema_config()))
    same = read_maps(get_peft_model(tiny_model(seed=1), dema_config()))
    other = read_maps(get_peft_model(tiny_model(), dema_config(seed=9)))
    name = "slots.0.map.down.weight"
    np.testing.assert_array_equal(first[name], same[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name], first["slots.1.map.down.weight"])


def test_a_bare_model_has_no_adapter() -> None:
    with pytest.raises(ConfigError, match="no active DeMA adapter"):
        trainable_tensors(tiny_model())


def test_slots_come_bottom_up() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=3))
    layers = slot_layers(model)
    assert [layer.is_last for layer in layers] == [False, False, True]
    assert [layer.slots["default"] for layer in layers] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"latent": 0}, "latent is 0"),
        ({"inner": -1}, "inner is -1"),
        ({"output": 0}, "output is 0"),
        ({"experts_global": 0}, "experts_global is 0"),
        ({"experts_type": 2}, "experts_type is 2"),
        ({"gate": "top1"}, "gate is 'top1'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"target_modules": ["q_proj"]}, "target_modules and target_parameters are not used"),
    ],
)
def test_bad_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dema_config(**fields)


def test_configuration_of_a_run() -> None:
    method = MethodConfig(slots=2, latent=7, experts_global=4, gate="uniform", activation="linear")
    config = DeMAConfig.from_method(method, output=5, seed=11)
    assert bank_shapes(config, config.output_width) == bank_shapes(method, 5)
    assert (config.gate, config.activation, config.seed) == ("uniform", "linear", 11)
    assert config.task_type == "CAUSAL_LM"
