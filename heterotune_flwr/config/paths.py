"""Relative paths in a YAML file are looked for beside it first, so that it means the same from everywhere.

What is not there stays as it is written: it is looked for in the current directory, or is no path at all but the name
of a shipped set, a backbone, something on a hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Settings of ``data`` that are paths whatever they look like.
_FILES = ("train", "test")


def beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a YAML file in ``folder`` says, with paths that lead somewhere from there made absolute."""
    changed = dict(content)
    for section, keys in {"data": _FILES, "alignment": ("anchors",)}.items():
        if isinstance(content.get(section), Mapping):
            changed[section] = _placed(content[section], keys, folder)
    if isinstance(content.get("types"), list):
        changed["types"] = [
            _placed(entry, ("backbone",), folder) if isinstance(entry, Mapping) else entry
            for entry in content["types"]
        ]
    return changed


def _placed(part: Mapping[str, Any], keys: tuple[str, ...], folder: Path) -> dict[str, Any]:
    return {
        key: _found(value, folder) if key in keys and _may_be_path(key, value) else value
        for key, value in part.items()
    }


def _may_be_path(key: str, value: Any) -> bool:
    """Of a backbone or anchors a bare word is a name: a folder tiny-a does not stand in for it."""
    return isinstance(value, str) and (key in _FILES or "/" in value or "." in value)


def _found(value: str, folder: Path) -> str:
    path = os.path.normpath(folder / Path(value).expanduser())
    return path if os.path.exists(path) else value
