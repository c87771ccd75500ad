"""Computing in float32 on CPUs where bfloat16 is slower: products without bfloat16 arithmetic, attention in training.

Without AVX-512 (or its successors) PyTorch multiplies bfloat16 matrices with scalar loops: on an AVX2 machine the
backward pass of a layer took a hundred times as long as in float32. With AVX-512 but no bfloat16 arithmetic oneDNN
emulates it: four times as long (training through a backbone: about twice). Weights and states stay as they are; a
product's operands are widened for the product alone, in bounded parts of the weights, and its result is rounded back,
which is what bfloat16 hardware computes too. Processors with bfloat16 support and GPUs are left alone.

The backward pass of PyTorch's fused attention (2.13.0) took 4 to 5 times as long in bfloat16 as in float32 even on a
processor with bfloat16 support; so attention that is trained through runs in float32, and frozen passes as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Weights that are float32 at the same time (16 MB).
WEIGHTS_AT_A_TIME = 2**22


@functools.cache
def slow_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices more slowly than float32 ones."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return True
    except (AttributeError, RuntimeError):  # a build without oneDNN has no fast product either
        return True
    # An older PyTorch does not say.
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return has.get("architecture") == "x86_64" and not (has["avx512_bf16"] or has["amx_bf16"])


class _Product(torch.autograd.Function):
    """``inputs @ weight.T + bias`` for a frozen weight, computed in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide = inputs.float()
        rows = _rows(weight)
        shifts = (
            [None] * -(-len(weight) // rows) if bias is None else torch.split(bias.float(), rows)
        )
        parts = [
            functional.linear(wide, part.float(), shift).to(inputs.dtype)
            for part, shift in zip(torch.split(weight, rows), shifts, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = upstream
        total: Tensor | None = None
        rows = _rows(weight)
        pieces = torch.split(gradient, rows, dim=-1)
        for piece, part in zip(pieces, torch.split(weight, rows), strict=True):
            product = piece.float() @ part.float()
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.to(gradient.dtype), None, None


def _rows(weight: Tensor) -> int:
    return max(1, WEIGHTS_AT_A_TIME // weight.shape[1])


class Float32Linear(nn.Linear):
    """A frozen bfloat16 layer whose products are float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``... x in`` to ``... x out``; input and result in the input's dtype."""
        if input.dtype != torch.bfloat16 or self.weight.requires_grad:
            return super().forward(input)
        result: Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


@functools.cache
def _float32_int8() -> type[nn.Linear]:
    from bitsandbytes.nn import Linear8bitLt

    class Float32Linear8bitLt(Linear8bitLt):  # type: ignore[misc]
        """LLM.int8() whose products with dequantized weights are float32."""

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x.float())
            return result.to(x.dtype)

    return Float32Linear8bitLt


def compute_in_float32(model: nn.Module) -> None:
    """Let the linear layers of a frozen model compute in float32 (in place; nothing is copied)."""
    layer: Any
    for layer in model.modules():
        kind = type(layer)
        if kind is nn.Linear and layer.weight.dtype == torch.bfloat16:
            layer.__class__ = Float32Linear
        elif kind.__name__ == "Linear8bitLt":
            layer.__class__ = _float32_int8()
        elif kind.__name__ == "Linear4bit":
            layer.compute_dtype, layer.compute_type_is_set = torch.float32, True


_ATTENTION = "sdpa_trained_in_float32"


def train_attention_in_float32(model: Any) -> None:
    """Let a model whose attention is PyTorch's fused one compute it in float32 wherever a gradient goes through it."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        _register_attention()
        model.set_attn_implementation(_ATTENTION)


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (``B x heads x T x d`` each) as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    narrow = query.dtype
    if narrow == torch.bfloat16 and torch.is_grad_enabled() and query.requires_grad:
        query, key, value = query.float(), key.float(), value.float()
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output.to(narrow), None
