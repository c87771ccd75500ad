"""LoRA on all linear layers of a backbone, and the two variants that rivals need.

=============================  ==================================================================
``lora.{module}.A``            rank x in, ``B``: out x rank (arXiv 2106.09685)
``lora.{module}.R``            ``method.lora_core``: rank x rank between frozen factors of the layer's own weight,
                               which are computed where they are used and never travel (LoRA-XS, arXiv 2405.17604)
``lora.{module}.residual``     ``method.lora_residual``: out x in, a dense change of the layer, never trained here
=============================  ==================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.dema.bank import RESIDUAL
from heterotune_flwr.schema import MethodConfig

#: Layers whose smaller side is longer than this are decomposed by a randomised method.
_EXACT_SVD = 1024


def attach_lora(backbone: Backbone, method: MethodConfig) -> tuple[Any, dict[str, nn.Parameter]]:
    """Attach LoRA (PEFT's) to every linear layer but ``lm_head``; returns the model and its named parameters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(backbone.model, config)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.data = part["default"].weight.data.float()
        if method.lora_core:
            parameters[f"lora.{name}.R"] = _add_core(layer, method.lora_rank)
        else:
            parameters[f"lora.{name}.A"] = layer.lora_A["default"].weight
            parameters[f"lora.{name}.B"] = layer.lora_B["default"].weight
        if method.lora_residual:
            parameters[f"lora.{name}{RESIDUAL}"] = _add_residual(layer)
    return model, parameters


class _Core(nn.Linear):
    """``x -> R (A x)`` in the place of LoRA's ``A``; ``weight`` is A, which is frozen."""

    core: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(super().forward(input), self.core)


def _add_core(layer: Any, rank: int) -> nn.Parameter:
    """Freeze the layer's LoRA factors at its weight's singular vectors, with a core of zeros between them."""
    weight = dense_weight(layer.get_base_layer()).to(torch.float32)
    left, right = singular_vectors(weight, rank)
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        down.weight.copy_(right)
        up.weight.copy_(left)
    down.weight.requires_grad_(False)
    up.weight.requires_grad_(False)
    down.__class__ = _Core
    down.core = nn.Parameter(torch.zeros(rank, rank, device=weight.device))
    core: nn.Parameter = down.core
    return core


def singular_vectors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left (out x rank) and right (rank x in) singular vectors; zeros beyond the weight's rank.

    Exact for small layers, a randomised method with a fixed seed for large ones; signs are fixed too, so that every
    client of a type gets the same.
    """
    found, weight = min(rank, *weight.shape), weight.cpu()
    if min(weight.shape) <= _EXACT_SVD:
        left, _, transposed = torch.linalg.svd(weight, full_matrices=False)
        left, right = left[:, :found], transposed[:found].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, _, right = torch.svd_lowrank(weight, q=2 * found + 10, niter=4)
        left, right = left[:, :found], right[:, :found]
    largest = left.abs().argmax(dim=0)
    signs = torch.sign(left[largest, torch.arange(found)])
    left, right = left * signs, right * signs
    padding = rank - found
    left = functional.pad(left, (0, padding))
    right = functional.pad(right, (0, padding))
    return left, right.T.contiguous()


def dense_weight(layer: Any) -> Tensor:
    """A linear layer's weight as ordinary numbers, whatever its quantization; out x in."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if weight.dtype == torch.int8:
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The layer takes the scales from its weight at its first multiplication.
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        dense = int8_vectorwise_dequant(weight.data, scales)
        return dense
    plain: Tensor = weight.data
    return plain.T if hasattr(layer, "nf") else plain  # GPT-2's Conv1D is in x out


def _add_residual(layer: Any) -> nn.Parameter:
    """Let the layer add a dense change to its output, zero at first."""
    shape = (layer.out_features, layer.in_features)
    device = layer.lora_A["default"].weight.device
    residual = nn.Parameter(torch.zeros(shape, device=device), requires_grad=False)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = inputs[0].to(residual.dtype)
        return output + functional.linear(states, residual).to(output.dtype)

    layer.register_forward_hook(add)
    return residual
