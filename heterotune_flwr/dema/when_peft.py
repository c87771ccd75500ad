"""Registers the tuner as soon as PEFT is imported, without importing it: a server needs neither PEFT nor torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from heterotune_flwr.errors import HeteroTuneError

_USERS = [f"{__package__}.{name}" for name in ("config", "layer", "model", "registration")]


def _register() -> None:
    loaded = [sys.modules[name].__spec__ for name in _USERS if name in sys.modules]
    if any(getattr(spec, "_initializing", False) for spec in loaded):
        return  # the tuner itself is importing PEFT, on behalf of somebody who registers it afterwards
    try:
        from heterotune_flwr.dema.registration import register

        register()
    except HeteroTuneError as error:  # an untested PEFT: its other tuners are none of our business
        warnings.warn(str(error), stacklevel=2)


class _WhenPeft(MetaPathFinder):
    """Finds PEFT as everybody does, and registers the tuner after PEFT's own code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of ``peft`` alone. Asked too by those who only want to know whether it is there."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "peft" else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            run(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the tuner now if PEFT is imported, else when it is."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenPeft())
