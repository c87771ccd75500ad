"""What other installed packages add: data sets, backbones, codecs and losses, found by their entry points.

A package on a machine says what it brings in its own ``pyproject.toml``::

    [project.entry-points."heterotune_flwr.codecs"]
    sign = "my_package.codecs:SIGN"

A configuration then names it (``exchange.codec=sign``). A name that came over the network thus chooses among what the
owner of the machine installed; it never says what is imported.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from heterotune_flwr.errors import ConfigError

Kind = Literal["backbones", "channels", "codecs", "data", "losses"]


@functools.cache
def installed(kind: Kind) -> dict[str, EntryPoint]:
    """Entry points of a kind by name; looked up once per process, for it reads every installed package's metadata."""
    found = entry_points(group=f"heterotune_flwr.{kind}")
    return {name: found[name] for name in sorted(found.names)}


def plugin_names(kind: Kind) -> tuple[str, ...]:
    """Names of the installed plugins of a kind, sorted."""
    return tuple(installed(kind))


@functools.cache
def load_plugin(kind: Kind, name: str) -> Any:
    """Import a plugin.

    Raises
    ------
    ConfigError
        There is none of that name, or importing it fails.

    """
    found = installed(kind).get(name)
    if found is None:
        raise ConfigError(f"no installed package brings {name!r} to heterotune_flwr.{kind}")
    try:
        return found.load()
    except Exception as error:  # whatever an import may raise
        raise ConfigError(
            f"{name!r} of heterotune_flwr.{kind} ({found.value}) cannot be imported: {error}"
        ) from error
