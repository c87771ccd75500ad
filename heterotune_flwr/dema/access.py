"""Reading and writing the tensors of an attached DeMA adapter by their canonical names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterotune_flwr.dema.layer import DeMALayer
from heterotune_flwr.errors import ConfigError, ExchangeError

#: canonical map name -> buffer of :class:`~.layer.SlotMaps`
_MAPS = {"down.weight": "down_weight", "down.bias": "down_bias", "up.weight": "up_weight"}


def active_adapter(model: nn.Module) -> str:
    """Name of the (first) active DeMA adapter of a model.

    Raises
    ------
    ConfigError
        The model carries no DeMA adapter, or none is active.

    """
    for module in model.modules():
        if isinstance(module, DeMALayer) and (active := module.active_names()):
            return active[0]
    raise ConfigError(
        f"{type(model).__name__} has no active DeMA adapter: attach one with get_peft_model or choose one "
        "with set_adapter"
    )


def slot_layers(model: nn.Module) -> list[DeMALayer]:
    """The slots of the active adapter, bottom up; the last one wraps the final norm."""
    name = active_adapter(model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, DeMALayer) and name in module.slots
    ]
    return sorted(layers, key=lambda layer: layer.slots[name])


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, of the active adapter."""
    name = active_adapter(model)
    return {
        key: parameter
        for layer in slot_layers(model)
        for key, parameter in layer.trainable(name).items()
    }


def _map_buffers(model: nn.Module) -> dict[str, Tensor]:
    name = active_adapter(model)
    return {
        f"slots.{layer.slots[name]}.map.{key}": getattr(layer.dema_maps[name], buffer)
        for layer in slot_layers(model)
        for key, buffer in _MAPS.items()
    }


@torch.no_grad()
def load_maps(model: nn.Module, maps: Mapping[str, NDArray[np.float32] | Tensor]) -> None:
    """Copy the frozen maps D, o, U of the slots into the active adapter.

    Raises
    ------
    ExchangeError
        A name is unknown or a shape is wrong; nothing has been changed then.

    """
    buffers = _map_buffers(model)
    tensors: dict[str, Tensor] = {}
    for name, value in maps.items():
        if name not in buffers:
            raise ExchangeError(f"the model has no map {name!r} (it has {len(buffers)} others)")
        tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensors[name].shape != buffers[name].shape:
            raise ExchangeError(
                f"{name!r} has shape {tuple(tensors[name].shape)}, the model expects {tuple(buffers[name].shape)}"
            )
    for name, tensor in tensors.items():
        buffers[name].copy_(tensor)


def read_maps(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """The frozen maps of the active adapter (copies)."""
    return {
        name: buffer.detach().to("cpu", torch.float32).numpy().copy()
        for name, buffer in _map_buffers(model).items()
    }
