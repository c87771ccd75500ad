"""Cores: trained matrices inside the linear layers of the upper blocks, shared inside a model type or kept.

``method.core_kind=square``
    A layer ``W x`` becomes ``W x + scale * U R (V x)`` with U, V the leading singular vectors of its own weight
    (LoRA-XS, arXiv 2405.17604), which every client computes alone and which never change; R alone (rank x rank) is
    trained and sent: few bytes.
``method.core_kind=lora``
    ``W x + scale * B (A x)`` with both factors trained (LoRA, arXiv 2106.09685): more bytes, more room.

Hooks on the layers, so that quantized weights, PEFT's wrappers and kept states below the first core stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterotune_flwr.backbones.loading import Backbone, linear_sides
from heterotune_flwr.backbones.structure import find_structure
from heterotune_flwr.dema.cores import with_effect
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.lora import dense_weight, singular_vectors


def first_core_block(method: MethodConfig, layers: int) -> int | None:
    """Index of the lowest block with cores; None without cores."""
    if method.core_rank == 0:
        return None
    return min(math.floor(method.core_from * layers), layers - 1)


@dataclass
class Cores:
    """The cores of one backbone: their parameters by name, and their hooks."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    _hooks: list[_Hook] = field(default_factory=list)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def add(self, path: str, layer: nn.Module, hook: _Hook, parts: dict[str, nn.Parameter]) -> None:
        """Put a core on a layer."""
        self.parameters |= {f"cores.{path}.{part}": value for part, value in parts.items()}
        self._hooks.append(hook)
        self._handles.append(layer.register_forward_hook(hook))

    def remove(self) -> None:
        """Take all cores off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the layers be what they are without cores."""
        for hook in self._hooks:
            hook.acts = False
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.acts = True


def attach_cores(backbone: Backbone, method: MethodConfig) -> Cores:
    """Give every linear layer from the first core block on a core."""
    first, cores = first_core_block(method, backbone.layers), Cores()
    if first is None:
        return cores
    blocks = find_structure(backbone.model).blocks
    for index in range(first, backbone.layers):
        block = backbone.model.get_submodule(f"{blocks}.{index}")
        for name, layer in block.named_modules():
            if linear_sides(layer) is not None:
                path = f"{blocks}.{index}.{name}"
                hook, parameters = _CORES[method.core_kind](backbone, path, layer, method)
                cores.add(path, layer, hook, parameters)
    return cores


class _Hook:
    """Adds ``scale * left middle (right x)`` to a layer's output while it ``acts``."""

    def __init__(self, scale: float, *matrices: Tensor) -> None:
        self._scale, self._matrices = scale, matrices  # in the order they meet the input
        self.acts = True

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.acts:
            return output
        return with_effect(inputs[0], output, self._scale, self._matrices)


_Made = tuple[_Hook, dict[str, nn.Parameter]]


def _square(backbone: Backbone, path: str, layer: nn.Module, method: MethodConfig) -> _Made:
    left, right = frozen_factors(backbone, path, layer, method.core_rank)
    core = nn.Parameter(torch.zeros(method.core_rank, method.core_rank, device=left.device))
    return _Hook(method.core_scale, right, core, left), {"R": core}


def _lora(backbone: Backbone, path: str, layer: nn.Module, method: MethodConfig) -> _Made:
    device, rank = backbone.device, method.core_rank
    sides = linear_sides(layer)
    assert sides is not None
    down = nn.Parameter(torch.zeros(rank, sides[0], device=device))
    up = nn.Parameter(torch.zeros(sides[1], rank, device=device))
    return _Hook(method.core_scale, down, up), {"A": down, "B": up}


_CORES = {"square": _square, "lora": _lora}


#: Singular vectors by (backbone, layer, rank): explicit per-process memory, they never change.
_known: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}


def frozen_factors(
    backbone: Backbone, name: str, layer: nn.Module, rank: int
) -> tuple[Tensor, Tensor]:
    """The factors around a square core of the layer ``name``: left (out x rank) and right (rank x in)."""
    key = (id(backbone), name, rank)
    if key not in _known:
        left, right = singular_vectors(dense_weight(layer).float(), rank)
        _known[key] = (left.to(backbone.device), right.to(backbone.device))
    return _known[key]


def forget_cores() -> None:
    """Forget all singular vectors (before their backbones are forgotten)."""
    _known.clear()
