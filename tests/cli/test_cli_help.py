"""The help of every command shows every text as it is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
import pytest
import typer.main
from click.testing import CliRunner
from typer.models import ArgumentInfo, OptionInfo
from typer.utils import get_params_from_function

from heterotune_flwr.cli import app
from heterotune_flwr.cli_help import at_work


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))


def _command(path: tuple[str, ...]) -> click.Command:
    command = PROGRAM
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    return command


def _plain(text: str) -> str:
    """Without frames and line breaks."""
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


#: Made once: making it takes longer than a help text.
PROGRAM = typer.main.get_command(app)
COMMANDS = list(_commands(PROGRAM))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_argument_and_option_as_it_is_written(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(PROGRAM, [*path, "--help"], env={"COLUMNS": "1000", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.exception
    shown, callback = _plain(done.output), _command(path).callback
    if callback is None:
        return
    for parameter in get_params_from_function(inspect.unwrap(callback)).values():
        if isinstance(parameter.default, ArgumentInfo | OptionInfo):
            assert parameter.default.help, f"{parameter.name} has no help"
            assert _plain(parameter.default.help) in shown


def test_all_rooms_are_there() -> None:
    assert {("deploy", "init"), ("node", "check"), ("worker", "stop"), ("backbones", "prune"), ("run",)} <= {
        *COMMANDS
    }  # fmt: skip


def test_a_terminal_is_told_at_once_that_work_has_begun_and_a_file_is_not(monkeypatch, capsys):
    for terminal, expected in ((False, ""), (True, "reading the data ...\n")):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        at_work("reading the data")
        assert capsys.readouterr().err == expected
