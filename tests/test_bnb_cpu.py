"""Gradients through a 4-bit backbone must survive an evaluation (bitsandbytes 0.50 on AVX512-BF16 CPUs)."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, modules

from heterotune_flwr.backbones.bnb_cpu import apply_bitsandbytes_cpu_remedy


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
    apply_bitsandbytes_cpu_remedy()
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
    needed = apply_bitsandbytes_cpu_remedy()
    assert apply_bitsandbytes_cpu_remedy() is needed
    assert needed == hasattr(modules, "has_avx512bf16")
    if needed:
        assert modules.has_avx512bf16() is False
        assert Linear4bit(64, 64).support_avx512bf16_for_cpu is False


@pytest.mark.skipif(
    not bitsandbytes.__version__.startswith("0.50."), reason="written for bitsandbytes 0.50"
)
def test_canary_the_hook_is_where_the_remedy_expects_it() -> None:
    assert apply_bitsandbytes_cpu_remedy()


def test_four_bit_backward_is_exact_against_dequantized_weights() -> None:
    apply_bitsandbytes_cpu_remedy()
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
