"""Prompts out of a file: a line each of a text file, or a column of any data file; conversations too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.data.columns import called
from heterotune_flwr.data.tables import form_of, rows
from heterotune_flwr.data.text_files import text_lines
from heterotune_flwr.errors import DataError
from heterotune_flwr.export.model import Question

#: Columns in which a prompt is looked for, in this order.
COLUMNS = ("prompt", "text", "instruction", "messages", "conversations")
STDIN = "-"


def read_prompts(place: str) -> list[Question]:
    """Prompts in their order; empty lines are none.

    Parameters
    ----------
    place
        A text file (a line each), a data file with one of :data:`COLUMNS`, or ``-``: lines of standard input.

    Raises
    ------
    DataError
        It cannot be read, is no text, has no such column, or nothing is in it.

    """
    found = list(_lines(standard_input()) if place == STDIN else _read(Path(place).expanduser()))
    if not found:
        name = "standard input" if place == STDIN else place
        raise DataError(f"there are no prompts in {name}: write one a line")
    return found


def _read(path: Path) -> Iterator[Question]:
    try:
        form = form_of(path)
    except DataError:  # no name of a data file
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a file with a prompt a line") from None
        yield from _lines(text_lines(path))
        return
    for _, where, row in rows(path, form):
        yield _asked(row, where)


def _asked(found: Mapping[str, Any], where: str) -> Question:
    row = called(found, *COLUMNS, "input")
    column = next((name for name in COLUMNS if name in row), None)
    if column is None:
        raise DataError(f"{where} has none of the columns {', '.join(COLUMNS)}")
    value = row[column]
    if isinstance(value, str) and value.strip():
        more = row.get("input") if column == "instruction" else None
        return f"{value}\n\n{more}" if isinstance(more, str) and more.strip() else value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return value
    raise DataError(f"{where}: {column!r} holds no prompt: a text, or a list of messages")


def _lines(lines: Iterator[str]) -> Iterator[str]:
    return (text for line in lines if (text := line.rstrip("\r\n")).strip())


def standard_input() -> Iterator[str]:
    """Lines of standard input, as they come (DataError: they are no text)."""
    try:
        yield from sys.stdin or ()  # none where it is closed
    except UnicodeDecodeError as error:
        raise DataError("standard input is not UTF-8 text") from error
