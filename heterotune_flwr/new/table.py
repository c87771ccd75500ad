"""What a data file holds, as far as a run must know it: columns, and which of them may be text, answer and client."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.data.columns import column_called
from heterotune_flwr.data.layouts import Layout, as_asked, recognised
from heterotune_flwr.data.tables import rows
from heterotune_flwr.data.values import plain_text
from heterotune_flwr.errors import DataError
from heterotune_flwr.fields import nearest
from heterotune_flwr.schema import DataConfig

#: What columns are usually called, the likeliest first.
_TEXTS = ("text", "sentence", "review", "comment", "content", "body", "message", "description", "question", "prompt",
          "query", "title", "input", "document", "utterance")  # fmt: skip
_LABELS = ("label", "sentiment", "category", "class", "intent", "topic", "target", "answer", "response", "completion",
           "output", "rating", "tag", "reply")  # fmt: skip
_CLIENTS = ("client", "user", "author", "owner", "site", "hospital", "source", "domain", "speaker", "group", "subject",
            "task", "customer", "company", "region", "shop", "store", "branch", "lab", "school")  # fmt: skip
_DATA = DataConfig()
#: Rows by which columns are judged.
_LOOKED_AT = 2000
#: A column of so many different values, or one for every so many rows, may name clients.
_FEWEST, _ROWS_EACH = 2, 8


@dataclass(frozen=True)
class Column:
    """One column: how many rows have something in it, how many different texts these are, and their mean length."""

    filled: int
    different: int
    letters: float


@dataclass(frozen=True)
class Table:
    """A data file by its columns (those of its first rows); ``layout``: how its columns say that it is read."""

    path: Path
    rows: int
    columns: dict[str, Column]
    layout: Layout | None

    def check(self, name: str, option: str) -> str:
        """The column a name means (DataError: there is no such column; the nearest is told)."""
        column = column_called(name, self.columns)
        if column is None:
            raise DataError(
                f"{option}: {self.path} has no column {name!r}{nearest(name, self.columns)} "
                f"(columns: {', '.join(self.columns)})"
            )
        return column

    def text(self, taken: Sequence[str] = ()) -> str | None:
        """The column that is likeliest to hold the texts."""
        free = self._free(taken)
        return _named(free, _TEXTS) or max(
            free, key=lambda c: self.columns[c].letters, default=None
        )

    def label(self, taken: Sequence[str]) -> str | None:
        """The column that is likeliest to hold the answers."""
        free = self._free(taken)
        few = [name for name in free if 2 <= self.columns[name].different <= self.rows / 4]
        fewest = min(few, key=lambda name: self.columns[name].different, default=None)
        return _named(free, _LABELS) or fewest or next(iter(free), None)

    def client(self, taken: Sequence[str]) -> str | None:
        """A column whose name says whose a row is, with several rows for each; None: no such column."""
        likely = [
            name
            for name in self._free(taken)
            if _FEWEST <= self.columns[name].different <= self.rows / _ROWS_EACH
        ]
        return _named(likely, _CLIENTS)

    def _free(self, taken: Sequence[str]) -> list[str]:
        return [
            name for name, column in self.columns.items() if column.filled and name not in taken
        ]


def look(path: Path) -> Table:
    """Read a file once for its columns.

    Raises DataError: as :func:`..data.tables.rows`; or there is not one row.
    """
    values: dict[str, Counter[str]] = {}
    layout, count = None, 0
    for count, (_, where, row) in enumerate(rows(path), start=1):
        if count == 1:
            layout = recognised(as_asked(row, _DATA), _DATA)
        if count > _LOOKED_AT:
            continue
        for name, value in row.items():
            if name and isinstance(name, str):
                values.setdefault(name, Counter())[_as_text(value, where)] += 1
    if not count:
        raise DataError(f"data file {str(path)!r} holds no example")
    columns = {name: _column(found, count) for name, found in values.items()}
    return Table(path, count, columns, layout)


def _column(found: Counter[str], rows_in_all: int) -> Column:
    filled = Counter({text: times for text, times in found.items() if text})
    seen = filled.total()
    # Of a long file the first rows alone are looked at: what is different in each of them stays so.
    grown = max(rows_in_all / _LOOKED_AT, 1.0) if len(filled) > seen / 2 else 1.0
    letters = sum(len(text) * times for text, times in filled.items()) / max(seen, 1)
    return Column(seen, int(len(filled) * grown), letters)


def _as_text(value: Any, where: str) -> str:
    """A value as text; empty where it is none, or a list or an object (a conversation is known by its layout)."""
    try:
        return plain_text(value, where, "column") or ""
    except DataError:
        return ""


def _named(names: Iterable[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that is among the given ones, whatever their case and ends: ``Review_Text``."""
    words = {name: re.split(r"[\W_]+", name.lower()) for name in names}
    for word in usual:
        for name, parts in words.items():
            if word in parts:
                return name
    return None
