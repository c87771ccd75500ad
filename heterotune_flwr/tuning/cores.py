"""Cores: small trained matrices inside the linear layers of the upper blocks, for what one model type shares.

A layer ``W x`` becomes ``W x + scale * U R (V x)`` with U, V the leading singular vectors of its own weight (LoRA-XS,
arXiv 2405.17604), which every client computes alone and which never change; R alone (rank x rank) is trained and sent.
Hooks on the layers, so that quantized weights, PEFT's wrappers and kept states below the first core stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.config.schema import MethodConfig
from heterotune_flwr.dema.structure import find_structure
from heterotune_flwr.tuning.lora import dense_weight, singular_vectors


def first_core_block(method: MethodConfig, layers: int) -> int | None:
    """Index of the lowest block with cores; None without cores."""
    if method.core_rank == 0:
        return None
    return min(math.floor(method.core_from * layers), layers - 1)


def attach_cores(
    backbone: Backbone, method: MethodConfig
) -> tuple[dict[str, nn.Parameter], list[RemovableHandle]]:
    """Give every linear layer from the first core block on a core; returns them by name, and what takes them off."""
    first = first_core_block(method, backbone.layers)
    if first is None:
        return {}, []
    blocks = find_structure(backbone.model).blocks
    cores: dict[str, nn.Parameter] = {}
    handles: list[RemovableHandle] = []
    for index in range(first, backbone.layers):
        block = backbone.model.get_submodule(f"{blocks}.{index}")
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                found = _vectors(backbone, f"{blocks}.{index}.{name}", layer, method.core_rank)
                core = nn.Parameter(
                    torch.zeros(method.core_rank, method.core_rank, device=found[0].device)
                )
                cores[f"cores.{blocks}.{index}.{name}.R"] = core
                handles.append(layer.register_forward_hook(_Hook(core, *found, method.core_scale)))
    return cores, handles


class _Hook:
    """Adds a core's effect to its layer's output."""

    def __init__(self, core: nn.Parameter, left: Tensor, right: Tensor, scale: float) -> None:
        self._core, self._left, self._right, self._scale = core, left, right, scale

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        inner = functional.linear(inputs[0].to(self._right.dtype), self._right)
        effect = functional.linear(functional.linear(inner, self._core), self._left)
        return output + self._scale * effect.to(output.dtype)


#: Singular vectors by (backbone, layer, rank): explicit per-process memory, they never change.
_known: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}


def _vectors(backbone: Backbone, name: str, layer: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    key = (id(backbone), name, rank)
    if key not in _known:
        left, right = singular_vectors(dense_weight(layer).float(), rank)
        _known[key] = (left.to(backbone.device), right.to(backbone.device))
    return _known[key]


def forget_cores() -> None:
    """Forget all singular vectors (before their backbones are forgotten)."""
    _known.clear()
