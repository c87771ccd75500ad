"""Gradients through a 4-bit backbone must survive an evaluation (bitsandbytes 0.50 on AVX512-BF16 CPUs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, modules
from tiny_backbones import save_backbone

from heterotune_flwr.backbones.bnb_cpu import apply_repacking_remedy
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone


class Net(torch.nn.Module):
    """An adapter below a 4-bit layer: its gradient has to go through the quantized weights."""

    def __init__(self, double_quantization: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapter = torch.nn.Linear(64, 64)
        self.frozen = Linear4bit(
            64,
            64,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=double_quantization,
        )
        self.frozen.requires_grad_(False)
        self.to("cpu")  # quantizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x + self.adapter(x))


def gradient(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.train()
    net.zero_grad()
    net(x).square().sum().backward()
    assert net.adapter.weight.grad is not None
    return net.adapter.weight.grad.clone()


@pytest.mark.parametrize("double_quantization", [True, False])
def test_gradients_and_weights_survive_an_evaluation(double_quantization: bool) -> None:
    apply_repacking_remedy()
    net = Net(double_quantization)
    x = torch.randn(8, 64)
    before = gradient(net, x)
    assert before.abs().max() > 0
    packed = net.frozen.weight.data.clone()
    net.eval()
    with torch.no_grad():
        first = net.frozen(x)  # the input carries no gradient: here the repacking happened
        net.frozen(x)
    assert torch.equal(net.frozen.weight.data, packed)
    torch.testing.assert_close(gradient(net, x), before)
    net.state_dict()
    net.eval()
    with torch.no_grad():
        assert torch.equal(net.frozen(x), first)


def test_the_remedy_is_in_place_and_idempotent() -> None:
    needed = apply_repacking_remedy()
    assert apply_repacking_remedy() is needed
    assert needed == hasattr(modules, "has_avx512bf16")
    if needed:
        assert modules.has_avx512bf16() is False
        assert Linear4bit(64, 64).support_avx512bf16_for_cpu is False


@pytest.mark.skipif(
    not bitsandbytes.__version__.startswith("0.50."), reason="written for bitsandbytes 0.50"
)
def test_canary_the_hook_is_where_the_remedy_expects_it() -> None:
    assert apply_repacking_remedy()


def test_four_bit_backward_is_exact_against_dequantized_weights() -> None:
    apply_repacking_remedy()
    net = Net(double_quantization=True)
    x = torch.randn(8, 64)
    weight = bitsandbytes.functional.dequantize_4bit(
        net.frozen.weight.data, net.frozen.weight.quant_state
    ).float()
    found = gradient(net, x).flatten()
    net.zero_grad()
    ((x + net.adapter(x)) @ weight.T).square().sum().backward()
    assert net.adapter.weight.grad is not None
    exact = net.adapter.weight.grad.flatten()
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.999


# Through the whole load path ------------------------------------------------------------------------------


@pytest.fixture
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    folder = save_backbone(tmp_path / "little", hidden=64)
    return load_backbone(BackboneSpec(str(folder), request.param), "cpu")


def dequantized(parameter: Any) -> torch.Tensor:
    return bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)


both = pytest.mark.parametrize("backbone", ["nf4", "nf4-single"], indirect=True)
IDS = torch.tensor([[5, 9, 30, 7, 12, 3, 100, 64]])


@both
def test_weights_survive_an_evaluation_and_a_move(backbone: Any) -> None:
    """bitsandbytes issue 2078: ``.to()`` moves weights that an evaluation has repacked as if they were not."""
    model = backbone.model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 3 * 7
    before = [dequantized(layer.weight) for layer in layers]
    with torch.no_grad():
        first = model(IDS).logits
    for layer, weight in zip(layers, before, strict=True):
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert torch.equal(dequantized(layer.weight), weight)
        assert torch.equal(dequantized(layer.weight.to("cpu")), weight)
        layer.to("cpu")
        assert torch.equal(dequantized(layer.weight), weight)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, first)


@both
def test_gradients_are_those_of_the_weights_with_checkpointing_too(backbone: Any) -> None:
    """bitsandbytes issue 2034: the backward pass reads the weight it met first, not the one it is given again."""
    model = backbone.model
    model(IDS)  # as before every round
    shift = torch.zeros(1, 1, backbone.hidden, requires_grad=True)

    def gradient() -> torch.Tensor:
        shift.grad = None
        embedded = model.get_input_embeddings()(IDS).float() + shift
        model(inputs_embeds=embedded.to(model.dtype), labels=IDS, use_cache=False).loss.backward()
        assert shift.grad is not None
        return shift.grad.flatten().clone()

    plain = gradient()
    model.train()  # it has no dropout; checkpoints are taken in training alone
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as this program does
    torch.testing.assert_close(gradient(), plain)
    model.gradient_checkpointing_disable()
    model.eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = torch.nn.Parameter(
                dequantized(module.weight).float(), requires_grad=False
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
    for layer in model.modules():  # not model.float(): transformers refuses it for quantized ones
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()
    exact = gradient()
    assert torch.nn.functional.cosine_similarity(plain, exact, dim=0) > 0.99
