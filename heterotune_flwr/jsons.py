"""JSON that somebody else wrote: read, and its values taken for what they should be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``, but what is nested too deep is a ValueError too (the library has a RecursionError)."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deep", "", 0) from error


def as_number(value: Any) -> float | None:
    """A value that should be a number: None for anything else, for a file may be damaged, or of another program."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_whole(value: Any, otherwise: int = 0) -> int:
    """A value that should be a whole number, cut to one."""
    number = as_number(value)
    return otherwise if number is None else int(number)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A value that should be a mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """A value that should be a list; an empty one for anything else."""
    return value if isinstance(value, list) else []
