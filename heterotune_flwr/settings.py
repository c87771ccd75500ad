"""All settings there are, each with what it takes, its default, its unit and a sentence, as they stand in the code.

The sentences are those of :func:`.fields.option`; of a transform's and a strategy's own options, those below
``Parameters`` in its docstring. `heterotune config --explain` and docs/settings.md show them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.channels.channel import channel_names, server_half
from heterotune_flwr.client.floors import Floors
from heterotune_flwr.client.node_keys import REQUIRED, ClientTable, ServerTable
from heterotune_flwr.cmga.read import TRANSFORMS
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.config.components import COMPONENT
from heterotune_flwr.config.plain import load_plain
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import kinds, nearest, taken, with_unit, without_none
from heterotune_flwr.schema import Config, TypeConfig
from heterotune_flwr.strategies.build import load_component

#: An entry of ``strategies``, whatever its name, and a type, whatever its number.
_ENTRY, _TYPE = "strategies.NAME", "types.N"
#: Transforms whose options are those of a dataclass.
_LIKE = {"within_type_mean": RobustMean, "server_opt": ServerOptimizer}


@dataclass(frozen=True)
class Setting:
    """A key, what values it takes, what it is if nobody says so, in which unit, and what it is for."""

    path: str
    takes: str
    default: str
    unit: str
    text: str


@dataclass(frozen=True)
class Section:
    """Settings that stand together."""

    path: str
    text: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """All settings: of a YAML file from top to bottom, then those of a node."""
    return [_groups(), *_of_schema(), *_of_strategies(), *_of_nodes()]


def find(key: str) -> list[Section]:
    """What a key names: a section with all below it, a setting, or settings whose last part it is.

    Raises ConfigError: there is nothing of that name; the nearest is told.
    """
    known, path = sections(), _general(key)
    below = [s for s in known if s.path == path or s.path.startswith(f"{path}.")]
    if any(section.path == path for section in below):
        return below
    exact = _having(known, lambda setting: setting.path == path)
    if found := exact or _having(known, lambda setting: setting.path.endswith(f".{path}")) or below:
        return found
    names = [setting.path for section in known for setting in section.settings]
    near = nearest(path, [*names, *(section.path for section in known)])
    raise ConfigError(
        f"there is no setting {key!r}{near} (`heterotune config --explain` lists all)"
    )


def _having(known: Sequence[Section], wanted: Callable[[Setting], bool]) -> list[Section]:
    cut = [
        dataclasses.replace(section, settings=tuple(filter(wanted, section.settings)))
        for section in known
    ]
    return [section for section in cut if section.settings]


def _general(key: str) -> str:
    """``strategies.NAME.chain`` of ``strategies.heterotune.chain``, whose ``method.`` is everybody's."""
    path = re.sub(r"^types\.\d+", _TYPE, key)
    path = re.sub(r"^strategies\.[^.]+", _ENTRY, path)
    return re.sub(r"^strategies\.NAME\.(method|train)(?=\.)", r"\1", path)


def _groups() -> Section:
    """The shipped files that a preset or a YAML file may begin with."""
    found = []
    for field in dataclasses.fields(Config):
        names = sorted(path.stem for path in (conf_root() / field.name).glob("*.yaml"))
        if names and field.name != "strategies":
            text = f"file of conf/{field.name} that section {field.name} begins with"
            found.append(
                Setting(f"groups.{field.name}", f"one of {', '.join(names)}", "null", "", text)
            )
    text = "Shipped settings that a YAML file begins with; what it says besides goes over them."
    return Section("groups", text, tuple(found))


def _of_schema() -> Iterator[Section]:
    for name, kind in kinds(Config).items():
        if name == "types":
            yield _table(_TYPE, TypeConfig)
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield _table(name, kind)


def _of_strategies() -> Iterator[Section]:
    common = {
        COMPONENT: ("a dotted path", "the strategy's class: of this package, or of one's own"),
        "method": ("settings of method", "the section method, for this strategy alone"),
        "train": ("settings of train", "the section train, for this strategy alone"),
        "robust": ("a rule, or key: value pairs", "another mean inside a type (below)"),
        "server_optimizer": ("key: value pairs", "what becomes of a round's change (below)"),
    }
    channels = {name: server_half(name).read({}) for name in _shipped_channels()}
    for name, options in channels.items():
        takes = "key: value pairs, or null" if options else "{}, or null"
        package = sys.modules[server_half(name).__module__.rpartition(".")[0]]
        common[name] = (takes, f"channel: {_summary(package)}")
    entry = [
        Setting(f"{_ENTRY}.{key}", takes, REQUIRED if key == COMPONENT else "null", "", text)
        for key, (takes, text) in common.items()
    ]
    yield Section(
        _ENTRY,
        "An entry of strategies, by a name that run.compare takes.",
        tuple(_shown(setting) for setting in (*entry, *_own_options())),
    )
    yield _table(f"{_ENTRY}.robust", RobustMean)
    yield _table(f"{_ENTRY}.server_optimizer", ServerOptimizer)
    for name, options in channels.items():
        if options:
            yield _table(f"{_ENTRY}.{name}", type(options))
    for name, transform in TRANSFORMS.items():
        path = f"{_ENTRY}.chain.{name}"
        known = _LIKE.get(name)
        found = _table(path, known).settings if known else tuple(_arguments(transform, path))
        yield Section(path, _summary(transform), found)


def _of_nodes() -> Iterator[Section]:
    for name, kind in (("server", ServerTable), ("client", ClientTable), ("floors", Floors)):
        table = _table(f"node.{name}", kind)
        dashed = (
            dataclasses.replace(
                setting,
                path=setting.path.replace("_", "-"),
                default=setting.default.replace("null", "not given"),
            )
            for setting in table.settings
        )
        yield dataclasses.replace(table, settings=tuple(dashed))


def _shipped_channels() -> list[str]:
    """Channels of this package: others' have pages of their own."""
    own = __name__.partition(".")[0]
    return [name for name in channel_names() if server_half(name).__module__.startswith(f"{own}.")]


def _own_options() -> Iterator[Setting]:
    """What the shipped strategies' classes take besides, each option with those that have it."""
    owners: dict[Setting, list[str]] = {}
    for path in sorted((conf_root() / "strategy").glob("*.yaml")):
        component = load_plain(path.read_text(), str(path))[COMPONENT]
        strategy = load_component(component, str(path))
        for setting in _arguments(strategy, _ENTRY):
            names = owners.setdefault(setting, [])
            names += [strategy.__name__] * (strategy.__name__ not in names)
    for setting, names in owners.items():
        yield dataclasses.replace(setting, text=f"{', '.join(names)}: {setting.text}")


def _table(path: str, cls: type) -> Section:
    """A dataclass of options as a section."""
    found = []
    for field in dataclasses.fields(cls):
        plain, nullable = without_none(kinds(cls)[field.name])
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        takes = taken(field, plain) + (" (or null)" if nullable else "")
        if field.metadata.get("by_strategy"):
            takes = "set by strategies alone"
        unit, text = field.metadata.get("unit", ""), field.metadata.get("help", "")
        found.append(_shown(Setting(f"{path}.{field.name}", takes, _written(default), unit, text)))
    return Section(path, _summary(cls), tuple(found))


def _arguments(function: Any, path: str) -> Iterator[Setting]:
    """The options of a transform or a strategy's class, with the sentences of its docstring."""
    made = inspect.getattr_static(function, "__init__") if isinstance(function, type) else function
    hints, texts = typing.get_type_hints(made), _parameter_texts(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "context":
            continue
        plain, nullable = without_none(hints[name])
        takes = taken(dataclasses.field(), _listed(plain)) + (" (or null)" if nullable else "")
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        text, unit = with_unit(texts.get(name, ""))
        yield _shown(Setting(f"{path}.{name}", takes, _written(default), unit, text))


def _listed(kind: Any) -> Any:
    """``list[int]`` of ``Sequence[int]``, as YAML has it."""
    if typing.get_origin(kind) is collections.abc.Sequence:
        return types.GenericAlias(list, typing.get_args(kind))
    return kind


def _parameter_texts(thing: Any) -> dict[str, str]:
    """Sentences of the section ``Parameters`` of a docstring, a class' parents' too, by name."""
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(thing)) if isinstance(thing, type) else [thing]:
        doc = inspect.cleandoc(owner.__doc__ or "")
        section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", doc, re.M | re.S)
        blocks = re.findall(r"^(\w[\w, ]*)\n((?: +.*\n?)+)", section[1] if section else "", re.M)
        for names, text in blocks:
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _summary(thing: Any) -> str:
    """First paragraph of a docstring, in one line."""
    doc = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")[0]
    return _plain_text(" ".join(doc.split()))


def _plain_text(text: str) -> str:
    """Docstrings' markup as that of Markdown."""
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", text).replace("``", "`")


def _shown(setting: Setting) -> Setting:
    required = setting.default == REQUIRED
    default = "required" if required else setting.default
    text = re.sub(r"^[A-Z](?=[a-z]*\b)", lambda first: first[0].lower(), _plain_text(setting.text))
    text = text.removesuffix(".")
    return dataclasses.replace(setting, default=default, text=text)


def _written(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, str):
        return value if value == REQUIRED or re.fullmatch(r"[\w./-]+", value) else json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value)
