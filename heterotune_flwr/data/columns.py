"""Which columns of a file nobody described are probably the text, the answer and the natural client."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.data.layouts import recognised
from heterotune_flwr.data.tables import rows
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

#: Names that columns have, the likeliest first.
_NAMES = {
    "text_field": (
        "text", "sentence", "question", "prompt", "query", "review", "comment", "document", "content", "body",
        "description", "message", "tweet", "title", "input",
    ),
    "label_field": (
        "label", "labels", "answer", "answers", "response", "completion", "reply", "target", "output", "category",
        "class", "sentiment", "topic", "summary", "translation", "intent",
    ),
    "client_field": (
        "client", "source", "site", "domain", "owner", "user", "author", "group", "customer", "hospital", "task",
    ),
}  # fmt: skip
#: Rows that are looked at, and different answers up to which a column may be a set of labels.
_ROWS, _LABELS = 500, 64


def likely_columns(path: Path, form: str | None = None) -> dict[str, str]:
    """Settings of ``data`` that name a file's columns; none where those by default are there or a layout is known.

    A column is found by its name, else text and answer by what they hold: the longest texts, and the fewest different
    answers.

    Raises DataError: the file cannot be read, or nothing in it can be a text and its answer; its columns are named.
    """
    first = [values for _, _, values in itertools.islice(rows(path, form), _ROWS)]
    if not first:
        raise DataError(f"data file {str(path)!r} holds no example")
    columns = [str(name) for name in first[0]]
    plain = DataConfig()
    if recognised(first[0], plain):
        return {}
    found: dict[str, str] = {}
    for setting, names in _NAMES.items():
        default = getattr(plain, setting)
        known = {name.lower(): name for name in columns if name not in found.values()}
        if match := next((known[name] for name in (default, *names) if name in known), None):
            found[setting] = match
    left = [name for name in columns if name not in found.values()]
    if "text_field" not in found and (name := _longest(first, left)):
        found["text_field"] = name
        left.remove(name)
    if "label_field" not in found and (name := _fewest(first, left)):
        found["label_field"] = name
    missing = [name for name in ("text_field", "label_field") if name not in found]
    if missing:
        raise DataError(
            f"no column of {str(path)!r} can be told to be the {' and the '.join(n[:-6] for n in missing)}: it has "
            f"{', '.join(columns)}; name them with data.text_field and data.label_field"
        )
    return {setting: name for setting, name in found.items() if name != getattr(plain, setting)}


def text_column(path: Path) -> str:
    """The column of a data file that holds its texts (DataError: none does)."""
    first = [values for _, _, values in itertools.islice(rows(path), _ROWS)]
    columns = [str(name) for name in first[0]] if first else []
    known = {name.lower(): name for name in columns}
    named = next((known[name] for name in _NAMES["text_field"] if name in known), None)
    found = named or _longest(first, columns)
    if found is None:
        raise DataError(f"no column of {str(path)!r} holds texts")
    return found


def _longest(found: Sequence[dict[str, Any]], columns: Sequence[str]) -> str | None:
    sizes = {
        name: sum(len(value) for row in found if isinstance(value := row.get(name), str))
        for name in columns
    }
    best = max(sizes, key=lambda name: sizes[name], default=None)
    return best if best is not None and sizes[best] else None


def _fewest(found: Sequence[dict[str, Any]], columns: Sequence[str]) -> str | None:
    """The column of the fewest different values, of two at least; one of different values everywhere is no label."""
    counts = {name: len({repr(row.get(name)) for row in found}) for name in columns}
    fit = [n for n in columns if 2 <= counts[n] <= _LABELS and counts[n] <= max(len(found) // 2, 2)]
    return min(fit, key=lambda name: counts[name], default=None)
