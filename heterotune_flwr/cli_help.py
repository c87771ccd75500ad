"""Help texts of the command line as they are written: words in brackets stay, and arguments keep theirs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function


def _argument_helps(callback: Callable[..., Any] | None) -> dict[str, str]:
    """Name -> help of a command's positional arguments, from its signature."""
    if callback is None:
        return {}
    parameters = get_params_from_function(inspect.unwrap(callback))
    return {
        name: parameter.default.help or ""
        for name, parameter in parameters.items()
        if isinstance(parameter.default, ArgumentInfo)
    }


def _tidy(command: TyperCommand | TyperGroup) -> None:
    # Typer 0.20 sets an argument's help before Click's own constructor runs, and that of Click 8.5 clears it.
    helps = _argument_helps(command.callback)
    for parameter in command.params:
        if text := getattr(parameter, "help", None) or helps.get(parameter.name or ""):
            # Typer takes [words] in brackets for Rich's markup.
            parameter.help = escape(text)  # type: ignore[attr-defined]
    command.help = None if command.help is None else escape(command.help)


def note(line: str) -> None:
    """Tell a line beside the output: on standard error."""
    typer.echo(line, err=True)


def at_work(line: str) -> None:
    """Tell whoever sits at a terminal that a command has begun: what it needs first may take many seconds."""
    if sys.stderr is not None and sys.stderr.isatty():
        note(f"{line} ...")


def typed_in() -> bool:
    """Whether standard input is a terminal; it may be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


class _Command(TyperCommand):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _tidy(self)


class _Group(TyperGroup):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _tidy(self)


class App(typer.Typer):
    """A Typer whose help shows every text as it is written; arguments as :class:`typer.Typer`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, **settings)

    def command(  # type: ignore[override]
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As :meth:`typer.Typer.command`."""
        return super().command(name, cls=_Command, **settings)
