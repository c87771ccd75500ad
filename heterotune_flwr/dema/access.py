"""Reading and writing the tensors of an attached DeMA adapter by their canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterotune_flwr.dema.bank import TIERS
from heterotune_flwr.dema.layer import DeMALayer
from heterotune_flwr.errors import ExchangeError

#: canonical map name -> buffer of :class:`~.layer.SlotMaps`
_MAPS = {"down.weight": "down_weight", "down.bias": "down_bias", "up.weight": "up_weight"}


def slot_layers(model: nn.Module) -> list[DeMALayer]:
    """The slots of a model with DeMA attached, bottom up."""
    layers = [module for module in model.modules() if isinstance(module, DeMALayer)]
    return sorted(layers, key=lambda layer: layer.slot)


def _active(layer: DeMALayer) -> str:
    return str(layer.active_adapters[0])


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, of the active adapter."""
    return {
        name: parameter
        for layer in slot_layers(model)
        for name, parameter in layer.trainable(_active(layer)).items()
    }


@torch.no_grad()
def _copy(targets: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name not in targets:
            raise ExchangeError(f"the model has no tensor {name!r} (it has {len(targets)} others)")
        tensor = torch.as_tensor(value)
        if tensor.shape != targets[name].shape:
            raise ExchangeError(
                f"{name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(targets[name].shape)}"
            )
        targets[name].copy_(tensor)


def load_tensors(model: nn.Module, values: Mapping[str, NDArray[np.float32] | Tensor]) -> None:
    """Copy values into the active adapter; unknown names or shapes raise ExchangeError."""
    _copy(trainable_tensors(model), values)


def _map_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"slots.{layer.slot}.map.{key}": getattr(layer.dema_maps[_active(layer)], buffer)
        for layer in slot_layers(model)
        for key, buffer in _MAPS.items()
    }


def load_maps(model: nn.Module, maps: Mapping[str, NDArray[np.float32] | Tensor]) -> None:
    """Copy the frozen maps D, o, U of the slots into the active adapter."""
    _copy(_map_buffers(model), maps)


def read_maps(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """The frozen maps of the active adapter (copies)."""
    return {name: buffer.cpu().numpy().copy() for name, buffer in _map_buffers(model).items()}


def apply_last_slot(model: nn.Module, states: Tensor) -> Tensor:
    """What the wrapped final norm returns for already normalised states ``T x d``.

    The same rounding as in a full forward pass, so that frozen states can be computed once and kept.
    """
    return slot_layers(model)[-1].add_delta(states, states)


def gate_mass(model: nn.Module) -> dict[str, float]:
    """Mean gate weight per tier in the last forward pass, averaged over slots; empty before one."""
    sums = dict.fromkeys(TIERS, 0.0)
    layers = [layer for layer in slot_layers(model) if _active(layer) in layer.gate_mass]
    for layer in layers:
        mass = layer.gate_mass[_active(layer)].cpu()
        start = 0
        for tier, count in layer.configs[_active(layer)].expert_counts.items():
            sums[tier] += float(mass[start : start + count].sum()) / len(layers)
            start += count
    return sums if layers else {}
