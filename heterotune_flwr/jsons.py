"""JSON that somebody else wrote: read, and its values taken for what they should be."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from heterotune_flwr.fields import kinds, without_none
from heterotune_flwr.names import safe_text


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``, but what is nested too deep is a ValueError too (the library has a RecursionError)."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deep", "", 0) from error


def as_number(value: Any) -> float | None:
    """A value that should be a number: None for anything else, for a file may be damaged, or of another program.

    Beyond 1e100 nothing is measured, and sums of such numbers would overflow.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < 1e100 else None


def as_whole(value: Any, otherwise: int = 0) -> int:
    """A value that should be a whole number, cut to one."""
    number = whole_or_none(value)
    return otherwise if number is None else number


def whole_or_none(value: Any) -> int | None:
    """A value that should be a whole number, cut to one; None for anything else."""
    number = as_number(value)
    return None if number is None else int(number)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A value that should be a mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def as_numbers(value: Any) -> dict[str, float]:
    """The numbers of a value that should be a mapping; what is none is left out."""
    told = {str(key): as_number(one) for key, one in as_mapping(value).items()}
    return {key: number for key, number in told.items() if number is not None}


def as_list(value: Any) -> list[Any]:
    """A value that should be a list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def read_as(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as what a type says (ValueError: it is none).

    Dataclasses have all their fields and no others. A whole number may stand for a float.
    """
    if kind is Any:
        return value
    kind, nullable = without_none(kind)
    if nullable and value is None:
        return None
    form, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(form) and isinstance(value, dict):
        fields = kinds(form)  # type: ignore[arg-type]
        if set(value) != set(fields):
            odd = sorted(set(value) ^ set(fields))
            raise ValueError(f"{where} lacks or does not know {safe_text(', '.join(odd), 80)}")
        return form(**{name: read_as(fields[name], value[name], name) for name in fields})  # type: ignore[operator]
    if form is list and isinstance(value, list):
        return [read_as(inner[0], one, where) for one in value]
    if form is dict and isinstance(value, dict):
        return {name: read_as(inner[1], one, where) for name, one in value.items()}
    if form is float and type(value) in (int, float):
        return as_float(value, where)
    if form in (str, int, bool) and type(value) is form:
        return value
    raise ValueError(f"{where} is no {getattr(form, '__name__', form)}")


def as_float(value: float, where: str) -> float:
    """A number as a float (ValueError: a whole one of JSON may have more digits than any float)."""
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where} is too large a number") from error
