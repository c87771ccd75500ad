"""What the values of a data file are as text: the one rule for all forms, columns and lists."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from heterotune_flwr.errors import DataError

#: Whole numbers above it are written as Python does: a float of this size does not know its last digits.
_EXACT = 2**53


def plain_text(value: Any, where: str, column: str) -> str | None:
    """The text of a value, None where it is empty: null, NaN, blank, or a list of nothing.

    A list of one value is that value. Numbers and truth values are written as JSON writes them, whole numbers without a
    point (a column of 0, 1 and nothing is 0.0 and 1.0 to most tools): ``0``, ``0.5``, ``true``.

    ``where`` and ``column`` are for errors. The value itself is never quoted: it may be private.

    Raises DataError: an object, bytes, a date, a list of several values or of lists; or a text that no tokenizer takes.
    """
    if isinstance(value, list):
        if len(value) > 1 or (value and isinstance(value[0], list)):
            kind = "a list of lists" if isinstance(value[0], list) else f"{len(value)} values"
            raise _refused(where, column, kind)
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return _sound(value, where, column) if value and value.strip() else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise _refused(where, column, "an infinite number")
        if isinstance(value, Decimal):
            return format(value, "f")
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)
    kinds: dict[type, str] = {dict: "an object", bytes: "bytes"}
    raise _refused(where, column, kinds.get(type(value), f"a {type(value).__name__}"))


def needed_text(value: Any, where: str, column: str) -> str:
    """:func:`plain_text` of a value that must not be empty (DataError)."""
    text = plain_text(value, where, column)
    if text is None:
        raise DataError(f"{where} has an empty {column}")
    return text


def _refused(where: str, column: str, kind: str) -> DataError:
    return DataError(
        f"{where}: {column} holds {kind}, where one text is needed; write the text itself there, or name another column"
    )


def _sound(text: str, where: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {column} holds half a character (an escape like \\ud83d without its second half); write "
            "the file anew, or leave this row out"
        ) from error
    return text
