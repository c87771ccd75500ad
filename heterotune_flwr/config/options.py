"""How the options of a section become a dataclass; ConfigError names what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heterotune_flwr.config.renamed import unknown_key
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import check_field, kinds, needed, option, without_none

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
    values: dict[str, Any] = {}
    for key in given:
        where, field = f"{section}.{key}", fields[key]
        values[key] = _typed(cls, field, types_of[key], given[key], where)
        check_field(field, types_of[key], values[key], where)
    missing = [name for name, field in fields.items() if name not in given and _required(field)]
    if missing and base is None:
        raise ConfigError.plain(f"{section} lacks {missing[0]}")
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ConfigError as error:
        if str(error).startswith(section):
            raise
        raise ConfigError(f"{section}: {error}", f"{section}: {error.told}") from error


def read_arguments(function: Callable[..., Any], given: Any, section: str) -> dict[str, Any]:
    """The same for a function's arguments: its signature says which there are, of which type."""
    hints = typing.get_type_hints(function)
    fields = [
        (name, _checked(hints.get(name)), _field(parameter.default))
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    cls: type[Any] = dataclasses.make_dataclass(function.__name__, fields, kw_only=True)
    values = read_options(cls, given, section)
    return {key: getattr(values, key) for key in given}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _field(default: Any) -> Any:
    return dataclasses.field() if default is inspect.Parameter.empty else option(default)


def _checked(kind: Any) -> Any:
    """A type that OmegaConf checks; what else a function of one's own is annotated with, it takes unchecked."""
    return kind if without_none(kind)[0] in (int, float, bool, str) else Any


def _typed(cls: type, field: dataclasses.Field[Any], kind: Any, value: Any, where: str) -> Any:
    """A value as its field's type."""
    if kind is Any:
        return value
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), {field.name: value})
        found: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list for a mapping
        raise ConfigError.of(where, value, needed(field, kind)) from error
    return found[field.name]


def check_between(where: str, value: Any, low: float, high: float, below: bool = False) -> None:
    """Refuse what is no number from ``low`` to ``high``, or ``below`` that."""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong or not low <= value <= high or (below and value == high):
        to = "below" if below else "to"
        raise ConfigError(f"{where} is {value!r}; a number from {low:g} {to} {high:g} is needed")
