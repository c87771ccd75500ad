"""How the values of a strategy's sections are checked; ConfigError names what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from heterotune_flwr.errors import ConfigError

#: Whose share a client gets: everybody's, or that of its own model type, where nothing crosses types.
SCOPES = ("all", "type")


def check_keys(section: str, given: Any, known: Iterable[str]) -> None:
    """Refuse what is no section, and keys that it does not have."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section} is {given!r}; write it as key: value pairs, or null for none")
    names = list(known)
    for key in given:
        if key not in names:
            raise ConfigError(f"{section} has no key {key!r}; known: {', '.join(names)}")


def check_scope(section: str, value: Any) -> None:
    """Refuse what is none of :data:`SCOPES`."""
    if value not in SCOPES:
        raise ConfigError(f"{section}.pool_over is {value!r}; {' or '.join(SCOPES)} is needed")


def check_between(where: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number from ``low`` to ``high``."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong or not low <= value <= high:
        raise ConfigError(f"{where} is {value!r}; a number from {low:g} to {high:g} is needed")


def check_number(where: str, value: Any, whole: bool, least: int) -> None:
    """Refuse what is no finite number (a ``whole`` one) from ``least``."""
    wrong = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
    if wrong or not least <= value < float("inf"):
        kind = f"a whole number from {least}" if whole else "a number that is not negative"
        raise ConfigError(f"{where} is {value!r}; {kind} is needed")
