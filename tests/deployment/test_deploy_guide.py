"""The commands of docs/deploy.md exist, with the options it gives them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer.main

from heterotune_flwr.cli import app
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.node_values import KEYS

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()


def test_every_command_of_the_guide_exists():
    root = typer.main.get_command(app)
    lines = re.findall(
        r"^    (?:\$ )?heterotune ((?:deploy|node|status|report)[^#\n]*)", GUIDE, re.MULTILINE
    )
    assert len(lines) > 14
    for line in lines:
        words: list[str] = shlex.split(line)
        command: Any = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), line
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= options, line


def test_every_setting_of_a_node_is_in_the_guide():
    for key in {*KEYS["client"], "accept-code", "port"}:
        assert f"`{key}" in GUIDE, key


def test_the_guide_makes_the_user_of_the_units_and_gives_it_the_folders():
    user, node_folder = Deployment.user, Deployment.node_folder
    commands = [
        line.split("#")[0].split() for line in GUIDE.splitlines() if line.startswith("    ")
    ]
    made = [words[-1] for words in commands if words[:1] == ["useradd"]]
    given = [words[1:] for words in commands if words[:1] == ["chown"]]
    assert made == [user, user]  # on the server and on a node
    assert ["-R", f"{user}:", node_folder] in given
    assert ["-R", f"{user}:", "/opt/heterotune/lab"] in given
