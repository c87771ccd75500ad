"""Strategies by name: those that ship, and the compositions of docs/strategies.md."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.schema import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "strategies.md"


@functools.cache
def composed() -> Config:
    """The YAML below the page's heading, as a run has it."""
    part = PAGE.read_text().partition("\n## Compositions\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", part, flags=re.S)
    return compose("yaml:groups: {types: tiny, data: debian_sections, alignment: labels}\n" + block)


def entry(name: str) -> dict[str, Any]:
    """The entry of ``strategies`` that ships under a name, or else the page's."""
    shipped = (conf_root() / "strategy" / f"{name}.yaml").is_file()
    config = compose(f"yaml:strategies: [{name}]") if shipped else composed()
    found: dict[str, Any] = copy.deepcopy(config.strategies[name])
    return found
