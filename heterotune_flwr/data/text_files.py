"""Rows of data files that are text: JSON lines, one JSON list of objects, CSV. Nothing is skipped or guessed at."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from heterotune_flwr.errors import DataError

#: Number of a row (its first line, or its place in a list), file and number for errors, values.
Row = tuple[int, str, dict[str, Any]]
_DELIMITERS = (";", "\t")
#: Longest field of a CSV file; a table of texts has longer ones than the csv module's 128 kB.
_LONGEST = 2**31 - 1
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_AS_UTF8 = "save it as UTF-8"


def open_text(path: Path) -> TextIO:
    """A text file, compressed or not, with its line ends and without the mark that some editors begin it with."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends.

    Raises DataError: it cannot be read, or is no UTF-8 text; the line where it stops being text is named.
    """
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if "\0" in line:
                    raise DataError(f"{path}:{number} is no UTF-8 text (a NUL); {_AS_UTF8}")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data file {str(path)!r} cannot be read: {error}") from error


def _not_utf8(path: Path) -> str:
    """Say where; a decoder reads ahead and cannot."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith(_UTF16):
                return f"data file {str(path)!r} is UTF-16, not UTF-8 text; {_AS_UTF8}"
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"{path}:{number} is not UTF-8 text; {_AS_UTF8}"
    return f"data file {str(path)!r} is not UTF-8 text; {_AS_UTF8}"


def json_rows(path: Path) -> Iterator[Row]:
    """One object per line, or one list of objects (DataError: neither)."""
    lines, begun = text_lines(path), False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _list_rows(path, "".join([line, *lines]), number)
            return
        where, begun = f"{path}:{number}", True
        yield number, where, _an_object(_parsed(line.rstrip("\r\n"), path, number), where)


def _list_rows(path: Path, text: str, first: int) -> Iterator[Row]:
    for number, row in enumerate(_parsed(text, path, first), start=1):
        where = f"{path}, row {number}"
        yield number, where, _an_object(row, where)


def _parsed(text: str, path: Path, first: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = first + error.lineno - 1
        raise DataError(f"{path}:{number} is not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep, or a number of too many digits"
        raise DataError(f"{path}:{first} is not valid JSON: {reason}") from error


def _an_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is not a JSON object; read are one object per line, or one list of objects"
        )
    return row


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows below a header, numbered by the line they begin in; separated by commas, semicolons or tabs.

    Raises DataError: a quote that is not closed where its field ends, a row of more or fewer fields than the header, a
    column's name that is there twice, or no header.
    """
    lines = text_lines(path)
    first = next((pair for pair in enumerate(lines, start=1) if pair[1].strip()), None)
    if first is None:
        raise DataError(f"data file {str(path)!r} is empty")
    above = first[0] - 1
    records = _records(path, itertools.chain([first[1]], lines), _delimiter(first[1]), above)
    names: list[str] = []
    for number, fields in records:
        where = f"{path}:{number}"
        if not names:
            names = [name.strip() for name in fields]
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{where}: the header has the column {twice!r} twice")
        elif len(fields) != len(names):
            raise DataError(
                f"{where} has {len(fields)} fields, the header has {len(names)}; put a text that holds the separator, "
                "or a line's end, in double quotes"
            )
        else:
            yield number, where, dict(zip(names, fields, strict=True))


def _delimiter(header: str) -> str:
    """A comma, unless it would make the header one column and another would not."""
    if len(next(csv.reader([header]), [])) > 1:
        return ","
    return max(_DELIMITERS, key=header.count) if any(d in header for d in _DELIMITERS) else ","


def _records(
    path: Path, lines: Iterator[str], delimiter: str, above: int
) -> Iterator[tuple[int, list[str]]]:
    """Records with the line that each begins in; blank lines are none."""
    csv.field_size_limit(_LONGEST)
    held: list[str] = []

    def fed() -> Iterator[str]:
        for line in lines:
            held.append(line)
            yield line

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    while True:
        held.clear()
        begins = above + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            opened = begins + _opening(held, delimiter)
            raise DataError(
                f"{path}:{opened}: a field opens a double quote that is not closed where the field ends; close it, "
                'or write quotes inside a text twice ("") in a field in quotes'
            ) from error
        if any(f[:1] == " " and f.lstrip(" ")[:1] == '"' for f in fields):
            raw = "".join(held)
            if any(f"{delimiter}{field}" in raw for field in fields if field[:1] == " "):
                raise DataError(
                    f"{path}:{begins}: a field has a space before its double quote, which is then no quote; remove it"
                )
        if fields:
            yield begins, fields


def _opening(record: list[str], delimiter: str) -> int:
    """In which of a record's lines, from 0, its last quoted field begins."""
    opened, state, before = 0, "outside", delimiter
    for number, line in enumerate(record):
        for sign in line:
            if sign == '"' and state == "outside" and before == delimiter:
                opened, state = number, "inside"
            elif sign == '"' and state != "outside":  # the second of two goes on inside
                state = "closed" if state == "inside" else "inside"
            elif state == "closed":
                state = "outside"
            before = sign
    return opened
