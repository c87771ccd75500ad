"""DeMA, the dense mixture of adapters: a PEFT tuner, its bank and its latent alignment.

The names below are imported on first use, so that the server's numpy-only modules
(:mod:`.bank`, :mod:`.gcca`, :mod:`.maps`) load without torch. Touching :class:`DeMAConfig` or
:class:`DeMAModel` registers the tuner with PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "DeMAConfig": "config",
    "DeMAModel": "model",
    "DeMALayer": "layer",
    "register": "registration",
    "trainable_tensors": "access",
    "load_tensors": "access",
    "load_maps": "access",
    "read_maps": "access",
    "apply_last_slot": "access",
    "gate_mass": "access",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    """Import ``name`` from its module, registering the tuner first."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.registration").register()
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
