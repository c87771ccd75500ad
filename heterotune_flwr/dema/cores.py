"""Low-rank changes of linear layers beside the slots: ``W x`` becomes ``W x + scale * B (A x)``.

Their tensors stand in the last slot's layer, so that PEFT treats them as it does the rest of an adapter; hooks let the
linear layers find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from heterotune_flwr.backbones.loading import linear_sides
from heterotune_flwr.errors import BackboneError

if TYPE_CHECKING:
    from heterotune_flwr.dema.config import DeMAConfig
    from heterotune_flwr.dema.layer import DeMALayer


def with_effect(inputs: Tensor, output: Tensor, scale: float, matrices: Sequence[Tensor]) -> Tensor:
    """A layer's output plus ``scale`` times what the matrices, in turn, make of its inputs, in their dtype."""
    effect = inputs.to(matrices[0].dtype)
    for matrix in matrices:
        effect = functional.linear(effect, matrix)
    return output + scale * effect.to(output.dtype)


class Core(nn.Module):
    """``A`` (rank x in) and ``B`` (out x rank) of one linear layer, zero at first."""

    def __init__(self, sides: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, sides[0], dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(sides[1], rank, dtype=torch.float32))


def core_key(path: str) -> str:
    """Name of a linear layer's core: modules' names hold no dots."""
    return path.replace(".", "/")


def changed_layers(model: nn.Module, config: DeMAConfig) -> dict[str, nn.Module]:
    """The linear layers that a configuration changes, by their names in the bare model.

    Raises BackboneError: one is not there, or no linear layer.
    """
    layers = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules()}
    found = {path: layers.get(path) for path in config.core_modules or ()}
    chosen = {p: layer for p, layer in found.items() if layer is not None and linear_sides(layer)}
    if missing := [path for path in found if path not in chosen]:
        raise BackboneError(
            f"{type(model).__name__} has no linear layer {missing[0]!r}, which this adapter changes: is it made for "
            "another backbone?"
        )
    return chosen


def new_cores(layers: dict[str, nn.Module], config: DeMAConfig) -> nn.ModuleDict:
    """A core for every layer."""
    sides = {path: linear_sides(layer) for path, layer in layers.items()}
    made = {core_key(p): Core(both, config.core_rank) for p, both in sides.items() if both}
    return nn.ModuleDict(made)


class _Hook:
    """Lets an adapter's core act on a layer while the adapter does."""

    def __init__(self, last: DeMALayer, adapter_name: str, key: str, scale: float) -> None:
        self._last, self._name, self._key, self._scale = last, adapter_name, key, scale

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._last.disable_adapters or self._name not in self._last.active_names():
            return output
        core: Any = self._last.dema_cores[self._name][self._key]  # type: ignore[index]
        return with_effect(inputs[0], output, self._scale, (core.A, core.B))


def hooked(
    last: DeMALayer, adapter_name: str, layers: dict[str, nn.Module], scale: float
) -> list[RemovableHandle]:
    """Put an adapter's cores to work on their layers, until the hooks are removed."""
    return [
        layer.register_forward_hook(_Hook(last, adapter_name, core_key(path), scale))
        for path, layer in layers.items()
    ]
