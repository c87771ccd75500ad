"""``heterotune new``: a run for one's own data, from options, or from questions where there is a terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterotune_flwr.cli_help import at_work, typed_in
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.names import printable

if TYPE_CHECKING:
    from heterotune_flwr.new.table import Table

#: Answer to a question for what is not wanted.
_NONE = "-"


def new(
    directory: Annotated[Path, typer.Argument(help="folder to make", metavar="DIR")],
    data: Annotated[
        Path | None,
        typer.Option(help="examples: .jsonl, .json, .csv, .tsv, .parquet, or a saved dataset"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="column with the text")] = None,
    label: Annotated[str | None, typer.Option(help="column with the answer")] = None,
    client_column: Annotated[
        str | None,
        typer.Option(
            "--client-column", help="column that says whose a row is; none: dealt by chance"
        ),
    ] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="how many clients there are")] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME@BITS of a model type, like smollm2@nf4; once for each [three tiny ones]"
        ),
    ] = None,
    anchors: Annotated[
        str | None,
        typer.Option(
            help="public texts like yours, on which models are aligned: a .txt or data file"
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="test file of the same columns [a share of the data]")
    ] = None,
) -> None:
    """Write a run for data of your own: DIR/run.yaml with a comment at each line, DIR/README.md with what to do next.

    Looks at the file and proposes columns, prompt, lengths, clients and rounds. On a terminal it asks for what is not
    said. Nothing is trained; `heterotune run DIR/run.yaml` then does.
    """
    at_work("reading the file" if data else "starting")
    from heterotune_flwr.new.plan import BACKBONES, Wishes, parse_backbone, plan
    from heterotune_flwr.new.table import look
    from heterotune_flwr.new.text import next_commands
    from heterotune_flwr.new.write import check_free, write

    check_free(directory)
    file = data or Path(_asked("--data", "File with the examples", None))
    table = look(file.expanduser())
    typer.echo(printable(_described(table)))
    columns = _columns(table, text, label, client_column)
    backbones = backbone or []
    if _asks() and not backbone:
        backbones = _asked("--backbone", "Model types, NAME@BITS each", " ".join(BACKBONES)).split()
    for word in backbones:
        parse_backbone(word)
    if _asks() and anchors is None:
        given = _asked(
            "--anchors", f"File of public texts like these ({_NONE}: a dictionary)", _NONE
        )
        anchors = None if given == _NONE else given
    wishes = Wishes(file.expanduser(), *columns, clients, backbones, anchors, test)
    at_work("reading the examples and comparing the public texts with them")
    made = plan(wishes, table)
    for note in write(made, directory):
        typer.echo(note)
    typer.echo(f"wrote {directory / 'run.yaml'} and {directory / 'README.md'}; next:")
    typer.echo(f"    cd {shlex.quote(str(directory))}")
    for command in next_commands(made):
        typer.echo(f"    {command}")


def _columns(
    table: Table, text: str | None, label: str | None, client: str | None
) -> tuple[str | None, str | None, str | None]:
    """The columns as given, as their names say, or as asked for."""
    from heterotune_flwr.data.columns import alike, column_called

    named = _given(*(column_called(name, table.columns) for name in ("text", "label")))
    usual = table.layout or len(named) == 2
    if not usual or text or label:
        text = text or _column(
            table, "--text", "Column with the text", table.text(_given(label, client))
        )
        label = label or _column(
            table, "--label", "Column with the answer", table.label(_given(text, client))
        )
    taken = _given(text, label) if text else named
    if client is None:
        proposed = table.client(taken)
        if _asks() and proposed:
            question = f"Column that says whose a row is ({_NONE}: none, dealt by chance)"
            client = _column(table, "--client-column", question, proposed, optional=True)
        elif proposed and alike(proposed, "client"):
            client = proposed
    return text, label, client


def _given(*names: str | None) -> list[str]:
    return [name for name in names if name]


def _column(
    table: Table, option: str, question: str, proposed: str | None, optional: bool = False
) -> Any:
    found = _asked(option, question, proposed, f" (columns: {', '.join(table.columns)})")
    return None if optional and found == _NONE else table.check(found, option)


def _asks() -> bool:
    """Whether somebody is there to ask."""
    return typed_in() and sys.stdout.isatty()


def _asked(option: str, question: str, proposed: str | None, more: str = "") -> str:
    """The answer to a question; ConfigError where there is nobody to ask."""
    if not _asks():
        near = f"; {proposed!r} may be it" if proposed else ""
        raise ConfigError(f"{option} is missing: {question[0].lower()}{question[1:]}{near}{more}")
    return str(typer.prompt(question, default=proposed)).strip()


def _described(table: Table) -> str:
    columns = ", ".join(
        f"{name} ({c.different} different)" for name, c in table.columns.items() if c.filled
    )
    how = f"; {table.layout.described()}" if table.layout else ""
    return f"{table.path}: {table.rows} rows; columns: {columns or ', '.join(table.columns)}{how}"
