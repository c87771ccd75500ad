"""How a page is put together: sections of sentences and tables, each with the command that makes it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.runner import load_results, table, told_gain

__all__ = ["bullets", "load_results", "number", "said", "section", "shown", "table", "told_gain"]


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return "\n\n".join([f"## {title}", *parts])


def said(words: str, indent: str = "") -> str:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(
        " ".join(words.split()), 120, initial_indent=indent, subsequent_indent=" " * len(indent),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def shown(what: str, command: str, body: str) -> str:
    """A table, after sentences that say what it shows and who makes it."""
    return said(f"{what} Made by `python -m benchmarks.{command}`.") + f"\n\n{body}"


def bullets(*lines: str) -> str:
    """A list."""
    return "\n".join(said(line, "* ") for line in lines)


def number(row: Mapping[str, Any], key: str, digits: int = 1) -> str:
    """A number of a row; a dash where it was not measured."""
    value = row.get(key)
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[list[str]]:
    """Numbers of some rows, key by key."""
    return [[number(row, key) for key in keys] for row in rows]
