"""Settings that are texts are taken as they are written: ``stop: ###``, ``labels: [yes, no, 01]``, ``revision: 12e5``.

YAML makes a boolean, a number, a comment or a mapping of these. The schema says which settings are texts, and which are
numbers (``010`` is ten, not eight); what a strategy of one's own has besides is left to YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import Config, MethodConfig, TrainConfig

_STR, _INT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_DECIMAL = re.compile(r"([-+]?)0*([0-9]+)")
_QUOTED = re.compile(r"(['\"]).*\1", re.DOTALL)
#: What of a strategy is the same in all; all strategies, by name.
STRATEGY = {"_component_": str, "method": MethodConfig, "train": TrainConfig}
_STRATEGIES = {"*": STRATEGY}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _below(kind: Any, key: str) -> Any:
    """The type of a mapping's entry or a list's item, None where the schema does not say."""
    kind, _ = _plain(kind)
    if kind is Config and key == "strategies":
        return _STRATEGIES
    if isinstance(kind, Mapping):
        return kind.get(key, kind.get("*"))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _hints(kind).get(key)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def _plain(kind: Any) -> tuple[Any, bool]:
    """A type without ``| None``, and whether that was there."""
    if isinstance(kind, types.UnionType):
        (inner,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return inner, True
    return kind, False


def kind_at(path: Sequence[str]) -> Any:
    """The type of the setting at a path, None where the schema does not say."""
    kind: Any = Config
    for key in path:
        kind = _below(kind, key)
    return kind


def literal(node: yaml.Node, kind: Any = Config) -> yaml.Node:
    """A parsed document in which settings that are texts keep what is written, and numbers are decimal.

    Nodes are replaced, not changed: an alias may stand for a text here and a number there. ``null`` stays null where a
    setting may be null, and in lists of texts is a text.
    """
    if isinstance(node, yaml.MappingNode):
        pairs = [(key, literal(value, _entry(kind, key))) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        items = [literal(item, _item(kind, item)) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not isinstance(node, yaml.ScalarNode) or node.style:  # quoted, or a block
        return node
    plain, nullable = _plain(kind)
    tag, value = node.tag, node.value
    if plain is str and not (tag == _NULL and (nullable or not value)):
        tag = _STR
    elif plain in (int, float) or tag == _INT:
        decimal = _DECIMAL.fullmatch(value)
        if decimal:
            tag, value = _INT, "".join(decimal.groups())
        elif ":" in value:  # 1:30 is ninety to YAML
            tag = _STR
    return yaml.ScalarNode(tag, value, node.start_mark, node.end_mark)


def _entry(kind: Any, key: yaml.Node) -> Any:
    if key.tag == _MERGE:
        return kind
    return _below(kind, key.value) if isinstance(key, yaml.ScalarNode) else None


def _item(kind: Any, item: yaml.Node) -> Any:
    """The type of a list's item. A preset lists strategies by name, or as ``name: {what differs}``."""
    if kind is _STRATEGIES:
        return kind if isinstance(item, yaml.MappingNode) else str
    return _below(kind, "0")


def override_text(text: str, kind: Any) -> str | None:
    """What an override says of a setting that is a text: itself, or what YAML reads in one pair of quotes around it.

    Nothing, and ``null``, are null where the setting may be.
    """
    _, nullable = _plain(kind)
    if nullable and text in ("", "null"):
        return None
    if _QUOTED.fullmatch(text):
        try:
            node = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:
            return text
        if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
            return str(node.value)
    return text


def is_text(kind: Any) -> bool:
    """Whether a setting is a text (or null)."""
    return _plain(kind)[0] is str


def check_texts(content: Any, kind: Any = Config, where: str = "") -> None:
    """Name the first setting that is no text and must be one, or a list that is no list of texts (ConfigError)."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_texts(value, _below(kind, str(key)), f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            check_texts(value, _below(kind, "0"), f"{where}.{index}")
    plain, nullable = _plain(kind)
    if content is None and nullable:
        return
    if plain is str and not isinstance(content, str):
        raise ConfigError.of(where, content, "it must be a text; quote it")
    if plain is str and content == "???":  # OmegaConf's word for a setting that is not given
        raise ConfigError.of(where, content, "that stands for nothing; give another text")
    if plain == list[str] and not isinstance(content, list):
        raise ConfigError.of(
            where, content, "it must be a list of texts, like [one, two]; quote those with signs"
        )
