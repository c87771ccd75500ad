"""Which column of a file is meant by a name: the one rule for data, anchors and prompts."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any


def alike(one: str, other: str) -> bool:
    """Whether two names differ in case and outer spaces at most."""
    return one.strip().casefold() == other.strip().casefold()


def column_called(name: str, columns: Collection[Any]) -> str | None:
    """The column of a name, else the only one that is :func:`alike`; None: there is no such column, or several."""
    if name in columns:
        return name
    found = [column for column in columns if isinstance(column, str) and alike(name, column)]
    return found[0] if len(found) == 1 else None


def called(row: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A row whose columns have the names by which they are asked for (:func:`column_called`)."""
    renamed = _renamed(tuple(row), names)
    return {renamed.get(key, key): value for key, value in row.items()} if renamed else row


@functools.lru_cache(maxsize=64)
def _renamed(columns: tuple[Any, ...], names: tuple[str, ...]) -> dict[str, str]:
    """Columns that are asked for by another name, with that name."""
    found = {column_called(name, columns): name for name in reversed(names)}
    return {column: name for column, name in found.items() if column and column not in names}
