"""What a setting is: its default, a line of help and the values it takes, said once in the field of a dataclass.

Both the check and the words of its error come from there, for the schema and for the options of a strategy alike.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.plugins import Kind, plugin_names

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
}
_UNIT = re.compile(r"(?P<help>.*) \[(?P<unit>[^\[\]]+)\]", re.DOTALL)


def option(
    default: Any,
    text: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    plugins: Kind | None = None,
    by_strategy: bool = False,
) -> Any:
    """Field of a setting.

    Parameters
    ----------
    default, text
        What it is unless somebody says otherwise (lists and mappings are copied), and its sentence of help. A unit
        stands at its end in brackets: ``patience for a round's replies [seconds]``.
    least, above, most, below
        Bounds of a number, the first and third included.
    choices, plugins
        The texts it may be, and the kind of installed plugins whose names it may be as well.
    by_strategy
        Whether a strategy sets it, and nobody else.

    """
    sentence, unit = with_unit(text)
    metadata = {
        "help": sentence,
        "unit": unit,
        "bounds": (least, above, most, below),
        "choices": tuple(choices),
        "plugins": plugins,
        "by_strategy": by_strategy,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def with_unit(text: str) -> tuple[str, str]:
    """A sentence of help, and the unit in brackets at its end (empty: none)."""
    said = _UNIT.fullmatch(text)
    return (said["help"], said["unit"]) if said else (text, "")


#: What :func:`kinds` has found out: every message's settings are checked.
_kinds: dict[type, Mapping[str, Any]] = {}


def kinds(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass' fields, by name."""
    if cls not in _kinds:
        _kinds[cls] = types.MappingProxyType(typing.get_type_hints(cls))
    return _kinds[cls]


def without_none(kind: Any) -> tuple[Any, bool]:
    """A type without ``| None``, and whether that was there."""
    if isinstance(kind, types.UnionType) and types.NoneType in typing.get_args(kind):
        (inner,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return inner, True
    return kind, False


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The texts a field may be; none where any will do."""
    named: tuple[str, ...] = field.metadata.get("choices", ())
    plugins = field.metadata.get("plugins")
    return (*named, *plugin_names(plugins)) if plugins else named


def needed(field: dataclasses.Field[Any], kind: Any) -> str:
    """What a field takes, for an error: ``a number above 0 and of at most 1 is needed (or null)``."""
    plain, nullable = without_none(kind)
    null = " (or null)" if nullable else ""
    if choices := choices_of(field):
        return f"choose from {', '.join(choices)}{null}"
    return f"{taken(field, plain)} is needed{null}"


def taken(field: dataclasses.Field[Any], plain: Any) -> str:
    """What a field of a type (without ``| None``) takes: ``a number above 0 and of at most 1``."""
    if choices := field.metadata.get("choices"):
        more = ", or of an installed package" if field.metadata["plugins"] else ""
        return f"one of {', '.join(choices)}{more}"
    least, above, most, below = field.metadata.get("bounds", (None,) * 4)
    if least is not None and most is not None:
        limits = f" from {least:g} to {most:g}"
    else:
        words = {"of at least": least, "above": above, "of at most": most, "below": below}
        said = [f"{word} {bound:g}" for word, bound in words.items() if bound is not None]
        limits = f" {' and '.join(said)}" if said else ""
    other = "a list of mappings" if typing.get_origin(plain) is list else "a mapping {key: value}"
    return f"{_WORDS.get(plain, other)}{limits}"


def _fits(field: dataclasses.Field[Any], value: Any) -> bool:
    choices = choices_of(field)
    if choices and value not in choices:
        return False
    least, above, most, below = field.metadata.get("bounds", (None,) * 4)
    return not (
        (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    )


def check_field(field: dataclasses.Field[Any], kind: Any, value: Any, where: str) -> None:
    """Refuse a value of the right type that the field does not take (ConfigError)."""
    if isinstance(value, float) and not math.isfinite(value):
        need = needed(field, kind).replace("a number", "a finite number", 1)
        raise ConfigError.of(where, value, need)
    if value is None or _fits(field, value):
        return
    near = nearest(str(value), choices_of(field))
    raise ConfigError.of(where, value, needed(field, kind) + near)


def check_fields(part: Any, where: str) -> None:
    """The same of all fields of a dataclass' instance."""
    types_of = kinds(type(part))
    for field in dataclasses.fields(part):
        name = f"{where}.{field.name}"
        check_field(field, types_of[field.name], getattr(part, field.name), name)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'this'?``, or nothing where none is near; initials do too: ``train.lr``."""
    names = list(known)
    near = [name for name in names if word == _initials(name)]
    near += difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _initials(name: str) -> str:
    """``train.lr`` of ``train.learning_rate``."""
    head, dot, last = name.rpartition(".")
    return head + dot + "".join(word[:1] for word in last.split("_"))
