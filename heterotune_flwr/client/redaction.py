"""What a deployed client's errors tell the server: never its data, no value of a configuration, nor where anything lies
on its machine.

The whole text is in the client's own log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.client.identify import is_simulated
from heterotune_flwr.errors import ConfigError, DataError, HeteroTuneError

#: Settings of a node that may be paths.
_PATHS = ("data", "test", "anchors", "state-dir", "cache", "backbone")
#: Where a deployed client keeps the whole text.
LOG = "worker.log in its state-dir"
#: An absolute path, or one from the home directory: in quotes, or where it begins a word.
_START = r"(?:~|[A-Za-z]:)?[/\\]"
_QUOTED = re.compile(rf"(['\"]){_START}.*?\1")
_PATH = re.compile(rf"(?<![\w/.:<>-]){_START}[^\s'\",;:()]+")


def told(error: HeteroTuneError, node_config: Mapping[str, Any]) -> str:
    """The line about an error that leaves a client; in a simulation all of it."""
    if is_simulated(node_config):
        return str(error)
    if isinstance(error, DataError | ConfigError):
        return f"{_without_paths(error.told, node_config)}; the node's own log says more ({LOG})"
    return _without_paths(str(error), node_config)


def _without_paths(text: str, node_config: Mapping[str, Any]) -> str:
    """A text with names in the place of a node's paths."""
    for key in _PATHS:
        given = str(node_config.get(key) or "")
        if "/" not in given and "\\" not in given:
            continue
        full = Path(given).expanduser().absolute()
        for form in sorted({given, str(full), str(full.resolve())}, key=len, reverse=True):
            text = text.replace(form, f"<{key}>")
    text = text.replace(str(Path.home()), "~")
    return _PATH.sub("<path>", _QUOTED.sub("<path>", text))
