"""Classes and functions that a server's configuration names by a dotted path; never a message's."""

from __future__ import annotations

import importlib
from typing import Any

from heterotune_flwr.errors import ConfigError

#: The key beside which the dotted path stands.
COMPONENT = "_component_"


def import_component(path: str, where: str) -> Any:
    """Import what a dotted path names; ConfigError where there is no such thing."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(
            f"{where}.{COMPONENT} is {path!r}; write a dotted path, package.module.Name"
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        hint = "install the package it is in, or put its folder on PYTHONPATH"
        raise ConfigError(f"{where}.{COMPONENT} is {path!r}: {error}; {hint}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}.{COMPONENT} is {path!r}: {error}") from error
