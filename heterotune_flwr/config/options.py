"""How the options of a section become a dataclass; ConfigError names what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heterotune_flwr.config.renamed import unknown_key
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import check_field, kinds, needed

T = TypeVar("T")


def read_options(
    cls: type[T],
    given: Any,
    section: str,
    base: T | None = None,
    known: Collection[str] = (),
) -> T:
    """Build a dataclass from the key: value pairs of a YAML section.

    Parameters
    ----------
    cls
        Its fields (:func:`heterotune_flwr.fields.option`) say which keys there are, of which type and range.
    given
        The section. Numbers and booleans in quotes are taken for what they say, as in the whole configuration.
    section
        What an error calls it.
    base
        What the others of the fields are; their defaults where None.
    known
        The keys it may have, where these are not all fields.

    Raises
    ------
    ConfigError
        It is no mapping, or a key or a value of it is wrong; an old key is refused with its new name.

    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{section} is {given!r}; write it as key: value pairs",
            f"{section} must be key: value pairs",
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in (known or fields):
            raise unknown_key(section, str(key), known or fields)
    types_of = kinds(cls)
    values = {}
    for key in given:
        where, field = f"{section}.{key}", fields[key]
        values[key] = _typed(cls, field, types_of[key], given[key], where)
        check_field(field, types_of[key], values[key], where)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ConfigError as error:
        if str(error).startswith(section):
            raise
        raise ConfigError(f"{section}: {error}", f"{section}: {error.told}") from error


def _typed(cls: type, field: dataclasses.Field[Any], kind: Any, value: Any, where: str) -> Any:
    """A value as its field's type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), {field.name: value})
        found: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError.of(where, value, needed(field, kind)) from error
    return found[field.name]


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
