"""What a person said of a run, for its report: the preset it is made from, and the settings they named themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.config.compose import INLINE, parse_overrides
from heterotune_flwr.config.plain import flatten, load_plain
from heterotune_flwr.config.shipped import presets
from heterotune_flwr.jsons import as_list, as_mapping, parse_json


@dataclass(frozen=True)
class Asked:
    """``preset``: a shipped one's name, or a file's; ``said``: dotted paths of the settings that a person named."""

    preset: str = ""
    said: tuple[str, ...] = ()

    def to_text(self) -> str:
        """As a run's configuration carries it."""
        return json.dumps({"preset": self.preset, "said": list(self.said)})

    @classmethod
    def from_text(cls, text: str) -> Asked:
        """Read :meth:`to_text`; of anything else nothing is known."""
        try:
            found = as_mapping(parse_json(text))
        except ValueError:
            return cls()
        return cls(str(found.get("preset") or ""), tuple(map(str, as_list(found.get("said")))))


def asked_of(config: str | None, overrides: str | Sequence[str] = "") -> Asked:
    """What is said by a configuration that composes (:func:`.compose.compose`); None: of a run that goes on."""
    said = [".".join(path) for path, _ in parse_overrides(overrides)]
    if config is None:
        return Asked("", tuple(said))
    if config.startswith(INLINE):
        return Asked("", (*_said(config.removeprefix(INLINE)), *said))
    path = Path(config).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return Asked(path.name, (*_said(path.read_text(encoding="utf-8-sig")), *said))
    name = path.stem if path.suffix in (".yaml", ".yml") else config
    return Asked(name if name in presets() else "", tuple(said))


def _said(text: str) -> list[str]:
    """Paths of what a file of a user's own says; ``groups`` are presets."""
    content = dict(as_mapping(load_plain(text, "the configuration")))
    content.pop("groups", None)
    if isinstance(content.get("strategies"), list):
        entries = [entry for entry in content["strategies"] if isinstance(entry, Mapping)]
        content["strategies"] = {name: value for entry in entries for name, value in entry.items()}
    types: dict[str, Any] = {str(n): t for n, t in enumerate(as_list(content.pop("types", None)))}
    return [str(path) for path, _ in flatten({**content, **({"types": types} if types else {})})]
