"""Reads what deploy/docker holds as Docker would, and runs a container's command on this machine."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "docker"


@dataclass
class Stage:
    """A stage of a Dockerfile, with what it inherits from the one below."""

    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        """The texts of an instruction, in order."""
        return [text for instruction, text in self.instructions if instruction == word]

    def last(self, word: str) -> str:
        return self.all(word)[-1]

    def command(self) -> list[str]:
        """What a container of it runs."""
        return [*json.loads(self.last("ENTRYPOINT")), *json.loads(self.last("CMD"))]

    def environment(self) -> dict[str, str]:
        """Its ENV and ARG names, and their values."""
        words = [
            word for text in (*self.all("ENV"), *self.all("ARG")) for word in shlex.split(text)
        ]
        return dict(word.split("=", 1) for word in words)


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile; ``FROM base AS x`` begins with what ``base`` has."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.M)
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            below, _, name = rest.partition(" AS ")
            inherited = found[below].instructions if below in found else []
            current = found[name] = Stage(name, list(inherited))
        elif word and current is not None:
            current.instructions.append((word, " ".join(rest.split())))
    return found


def services() -> dict[str, dict[str, Any]]:
    """The services of the compose file."""
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"])


def command_of(service: dict[str, Any]) -> list[str]:
    """What a service's container runs: its own words, or those of its image."""
    image = stages()[service["build"]["target"]]
    entrypoint = service.get("entrypoint")
    if entrypoint is not None:
        return [*entrypoint, *service.get("command", [])]
    return [
        *json.loads(image.last("ENTRYPOINT")),
        *service.get("command", json.loads(image.last("CMD"))),
    ]


def requirements() -> list[str]:
    """Lines of server.txt."""
    lines = (FOLDER / "server.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
