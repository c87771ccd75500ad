"""DeMA, the dense mixture of adapters: a PEFT tuner and its bank of shared tensors.

A tuner and nothing else: no alignment, no training loop, no federation. The names below are imported on first use, so
that the server's numpy-only :mod:`.bank` loads without torch. Importing this package registers
the tuner with PEFT: at once where PEFT is imported already, else as soon as it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heterotune_flwr.dema.when_peft import register_when_imported

if TYPE_CHECKING:
    from heterotune_flwr.dema.access import (
        active_adapter,
        load_maps,
        read_maps,
        slot_layers,
        trainable_tensors,
    )
    from heterotune_flwr.dema.config import DeMAConfig
    from heterotune_flwr.dema.layer import DeMALayer, MergeError
    from heterotune_flwr.dema.model import DeMAModel
    from heterotune_flwr.dema.registration import register

__all__ = [
    "DeMAConfig",
    "DeMALayer",
    "DeMAModel",
    "MergeError",
    "active_adapter",
    "load_maps",
    "read_maps",
    "register",
    "slot_layers",
    "trainable_tensors",
]

_MODULES = {
    "DeMAConfig": "config",
    "DeMALayer": "layer",
    "DeMAModel": "model",
    "MergeError": "layer",
    "register": "registration",
}


def __getattr__(name: str) -> Any:
    """Import ``name`` from its module, registering the tuner first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.registration").register()
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'access')}"), name)


register_when_imported()
