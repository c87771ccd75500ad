"""Configuration text -> plain containers: bounded, and of a configuration that came over the network without ``${``.

Nothing is resolved here. OmegaConf resolves ``${...}`` later, in values it is given: of a text from this machine it
may, of one from elsewhere :func:`refuse_interpolation` leaves it nothing to resolve.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from heterotune_flwr.config.texts import literal
from heterotune_flwr.errors import ConfigError, one_line
from heterotune_flwr.schema import Config, TypeConfig

#: Letters of a configuration, overrides included, that a deployed client reads.
LONGEST = 1 << 18
#: Mappings and lists inside one another.
DEEPEST = 32
#: Of a whole number: OmegaConf and YAML's base 60 know no bound, and an endless number takes for ever to write.
_LARGEST = 2**63
#: Values of a configuration, those that aliases stand for counted each time.
_MOST = 1 << 18
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; lists are values."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


class _Loader(yaml.SafeLoader):
    """YAML without objects, dates and repeated keys, ``1e-3`` a number as in JSON, no deeper than :data:`DEEPEST`."""

    deep = 0
    aliases = True

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node; the bounds are checked before anything below it is read."""
        if not self.aliases and self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name)", self.get_mark())
        if self.deep >= DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"over {DEEPEST} levels", self.get_mark())
        self.deep += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.deep -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct one mapping; of two equal keys the second would be taken without a word."""
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, found)
        for tag, found in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _NetworkLoader(_Loader):
    """The same without aliases: a few of them stand for a billion values."""

    aliases = False


def load_plain(text: str, where: str, trusted: bool = True, kind: Any = Config) -> Any:
    """YAML text as mappings, lists, texts, numbers, booleans and null.

    Parameters
    ----------
    text, where
        What to read, and what to call it in an error.
    trusted
        Whether it is this machine's own; else it may have no aliases.
    kind
        What it is of the schema, which says what is a text (:func:`.texts.literal`).

    Raises
    ------
    ConfigError
        It is not YAML, too deep, has a key twice, or a value of another kind.

    """
    try:
        loaded = _loaded((_Loader if trusted else _NetworkLoader)(text), kind)
        _check_kinds(loaded)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        shown = one_line(getattr(error, "problem", None) or error)
        raise ConfigError(
            f"{where} is not valid YAML: {shown}{place}", f"{where} is not valid YAML{place}"
        ) from error
    return loaded


def _loaded(loader: _Loader, kind: Any) -> Any:
    try:
        node = loader.get_single_node()
        _check_count(node)
        return None if node is None else loader.construct_document(literal(node, kind))
    finally:
        loader.dispose()


def _check_count(root: yaml.Node | None) -> None:
    """Refuse more than :data:`_MOST` values: aliases can stand for a billion, or for one without end."""
    waiting, seen = [] if root is None else [root], 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        if seen > _MOST:
            raise ValueError(f"more than {_MOST} values")
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]


def _check_kinds(loaded: Any) -> None:
    """Refuse what a configuration cannot hold: bytes, sets, dates, endless numbers."""
    waiting = [loaded]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError("a number of too many digits")
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"a {type(value).__name__}, which no setting is")


def refuse_interpolation(value: Any) -> None:
    """Refuse ``${`` in any key or text of what has been parsed, at any depth (ConfigError).

    It is looked for here and not in the raw text: YAML's escapes and a shell's quotes hide it there.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_interpolation(key)
            refuse_interpolation(item)
    elif isinstance(value, list):
        for item in value:
            refuse_interpolation(item)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError.plain("a deployed client takes no ${...} interpolation from the server")


def expected_at(key: str) -> str:
    """What the schema expects at a key, told without what is there."""
    parts = re.findall(r"\w+", key)
    hints: Any = Config
    if parts and parts[0] in typing.get_type_hints(
        TypeConfig
    ):  # OmegaConf leaves out in which list
        parts[:0], hints = ["types"], {"types": TypeConfig}
    known: list[str] = []
    for part in parts:
        if isinstance(hints, dict):
            found = hints.get(part)
        elif dataclasses.is_dataclass(hints):
            found = typing.get_type_hints(hints).get(part)
        else:
            found = next(iter(typing.get_args(hints)), None) if part.isdigit() else None
        if found is None:
            break
        known.append(part)
        hints = found
    if not known:
        return "the configuration does not fit the schema"
    kind = hints.__name__ if isinstance(hints, type) else str(hints)
    return f"{'.'.join(known)}: a value of type {kind} is needed"
