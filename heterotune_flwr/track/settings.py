"""Which settings of a run a tracker is told: numbers, switches and choices, and no text of anybody's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.fields import choices_of
from heterotune_flwr.schema import Config

Value = str | int | float | bool
#: Sections whose settings are told; paths, labels and names of data stay here.
_SECTIONS = ("method", "train", "alignment", "exchange", "server")


def settings_of(config: Config) -> dict[str, dict[str, Value]]:
    """By strategy: the run's settings, and the strategy's own where they are numbers or switches."""
    common: dict[str, Value] = {}
    for section in _SECTIONS:
        part = getattr(config, section)
        for setting in dataclasses.fields(part):
            value = getattr(part, setting.name)
            if _plain(value) or (isinstance(value, str) and value in choices_of(setting)):
                common[f"{section}.{setting.name}"] = value
    for index, entry in enumerate(config.types):
        common[f"types.{index}"] = f"{Path(entry.backbone).name}@{entry.bits} x {entry.clients}"
    own = {name: dict(_numbers(config.strategies.get(name) or {})) for name in config.run.compare}
    return {name: common | own[name] for name in config.run.compare}


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _numbers(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Value]]:
    """Numbers and switches of a strategy's entry, by dotted name."""
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif _plain(value):
            yield name, value
