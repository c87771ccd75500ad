"""Composes a run's configuration: preset + groups + strategies + dotted overrides -> ``Config``.

A preset under ``conf/`` is YAML whose ``groups`` name one file per section (``data: debian_sections`` reads
``conf/data/debian_sections.yaml``) and whose ``strategies`` list names files of ``conf/strategy``; every
other key overrides what the groups said. Overrides come last: ``train.learning_rate=1e-3 run.seeds=[0,1]``.
"""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heterotune_flwr.config.choices import check_choices, check_left_alone
from heterotune_flwr.config.numbers import check_numbers
from heterotune_flwr.config.paths import beside
from heterotune_flwr.config.plain import (
    DEEPEST,
    LONGEST,
    expected_at,
    load_plain,
    refuse_interpolation,
)
from heterotune_flwr.config.renamed import unknown_key
from heterotune_flwr.config.shipped import (
    conf_root,
    group,
    names,
    parsed,
    presets,
    read,
    shipped_strategy,
)
from heterotune_flwr.config.texts import (
    check_texts,
    is_text,
    kind_at,
    override_text,
)
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import nearest
from heterotune_flwr.schema import NATURAL_INSTRUCTIONS, Config, TypeConfig

INLINE = "yaml:"
_SECTIONS = tuple(f.name for f in dataclasses.fields(Config))
#: Keys of ``data`` that fit a preset's own data set: with another training file they take their defaults.
ABOUT_SHIPPED = {
    "label_field", "client_field", "examples_per_client", "personal_test_examples", "global_test_examples",
    "max_answer_tokens", "prompt", "template",
}  # fmt: skip


def _find_preset(config: str, trusted: bool) -> dict[str, Any]:
    if config.startswith(INLINE):
        return parsed(config.removeprefix(INLINE), "the inline configuration", trusted)
    path = Path(config).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            content = read(path)
            if not content:
                raise ConfigError(
                    f"configuration file {config} is empty; name a preset, or write a run into it"
                )
            return beside(content, path.resolve().parent)
        named = conf_root() / path.name
        if named.is_file():
            return read(named)
        raise ConfigError(f"configuration file {config} does not exist")
    named = conf_root() / f"{config}.yaml"
    if not named.is_file():
        known = presets()
        raise ConfigError(
            f"unknown preset {config!r}{nearest(config, known)} (known: {', '.join(known)}; or a path.yaml)"
        )
    return read(named)


def _merge(base: Any, update: Any) -> Any:
    if isinstance(base, dict) and isinstance(update, dict):
        return {**base, **{key: _merge(base.get(key), value) for key, value in update.items()}}
    return update


def _expand(preset: dict[str, Any]) -> dict[str, Any]:
    """Resolve ``groups`` and the ``strategies`` list of a preset."""
    preset = dict(preset)
    groups = preset.pop("groups", {})
    if not isinstance(groups, dict):
        raise ConfigError.plain(
            "groups must map sections to file names, like {data: debian_sections}"
        )
    merged: dict[str, Any] = {}
    for section, name in groups.items():
        if section not in _SECTIONS:
            near = nearest(str(section), _SECTIONS)
            raise ConfigError(
                f"groups.{section}: no such section{near}", f"groups: no such section{near}"
            )
        merged[section] = group(section, str(name))
    strategies = preset.get("strategies")
    if isinstance(strategies, list):
        preset["strategies"] = dict(_listed_strategy(entry) for entry in strategies)
    return {key: _merge(merged.get(key), value) for key, value in {**merged, **preset}.items()}


def _listed_strategy(entry: Any) -> tuple[str, Any]:
    """``name``, ``name: {what differs from conf/strategy/name.yaml}``, or one's own ``name: {_component_: ...}``."""
    name, changes = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, {})
    if isinstance(changes, dict) and "_component_" in changes and name not in names("strategy"):
        return str(name), changes
    return str(name), _merge(shipped_strategy(str(name), "strategies"), changes)


def parse_overrides(
    overrides: str | Sequence[str], trusted: bool = True
) -> list[tuple[list[str], Any]]:
    """``"a.b=1 c=[x,y]"`` (shell quoting allowed) or a list of such words -> [(path, value)].

    Raises
    ------
    ConfigError
        A word is not ``dotted.path=value``.

    """
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise ConfigError(
            f"the overrides {overrides!r} cannot be split: {error}",
            "the overrides cannot be split: a quote is open",
        ) from error
    parsed = []
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path or path.count(".") >= DEEPEST:
            raise ConfigError(
                f"override {word!r} must read dotted.path=value",
                "every override must read dotted.path=value",
            )
        value: Any
        kind = kind_at(path.split("."))
        try:
            value = (
                override_text(text, kind)
                if is_text(kind)
                else load_plain(text, path, trusted, kind)
            )
        except ConfigError:  # not YAML: the text itself; the schema judges it
            value = text
        if isinstance(value, dict) and not text.lstrip().startswith("{"):
            value = text  # a text with a colon at its end, not a mapping
        parsed.append((path.split("."), value))
    return parsed


def _apply(tree: Any, path: list[str], value: Any, full: str) -> None:
    head, *rest = path
    if isinstance(tree, list):
        if not head.isdigit() or int(head) >= len(tree):
            raise ConfigError(
                f"override {full}: {head!r} is not an index below {len(tree)}",
                f"an override names an entry of a list; it must be an index below {len(tree)}",
            )
        key: Any = int(head)
    else:
        key = head
        if rest and not isinstance(tree.get(key), dict | list):
            tree[key] = {}
    if rest:
        _apply(tree[key], rest, value, full)
    else:
        tree[key] = value


def _check_keys(content: Any, schema: Any, where: str) -> None:
    """Name the first unknown key with its whole path and the nearest known one."""
    if not dataclasses.is_dataclass(schema) or not isinstance(content, dict):
        return
    hints = typing.get_type_hints(schema)
    for key, value in content.items():
        path = f"{where}.{key}" if where else key
        if key not in hints:
            raise unknown_key(where, str(key), hints)
        if key == "types" and where == "":
            for index, entry in enumerate(value or []):
                _check_keys(entry, TypeConfig, f"types.{index}")
        else:
            _check_form(value, hints[key], path)
            _check_keys(value, hints[key], path)


def _check_form(value: Any, hint: Any, where: str) -> None:
    """Refuse a list for a mapping and a mapping for a list: OmegaConf has no word on where it met them."""
    form = typing.get_origin(hint)
    if form is dict and not isinstance(value, dict):
        raise ConfigError.of(where, value, "write it as key: value pairs, {} for none")
    if form is list and isinstance(value, dict):
        raise ConfigError.of(where, value, "it must be a list, like [0, 1]")


def compose(config: str, overrides: str | Sequence[str] = "", trusted: bool = True) -> Config:
    """The resolved configuration of a run.

    Parameters
    ----------
    config
        A preset's name, the path of a YAML file, or ``yaml:`` followed by YAML text.
    overrides
        Dotted overrides in one shell-quoted string, or one per item.
    trusted
        Whether both come from this machine. What a server sent may name shipped presets but no file, and may
        not interpolate (``${oc.env:...}`` would read this machine's environment).

    Raises
    ------
    ConfigError
        Unknown preset, group, key or value; the message names it and the nearest right one.

    """
    if not trusted:
        _check_untrusted(config, overrides)
    found = _find_preset(config, trusted)
    content = _expand(found)
    _check_sections(content)
    said = set() if _is_shipped(config) else set(found.get("data") or {})
    content["strategies"] = content.get("strategies") or {}
    for path, value in parse_overrides(overrides, trusted):
        if path[0] == "data":
            said |= set(value or {}) if len(path) == 1 and isinstance(value, dict) else {path[-1]}
        if path[0] == "strategies" and len(path) > 2 and path[1] not in content["strategies"]:
            content["strategies"][path[1]] = shipped_strategy(path[1], "strategies")
        if len(path) == 2 and path[0] == "train":
            # Said for all: what single strategies had is void.
            for spec in content["strategies"].values():
                if isinstance(spec, dict) and isinstance(spec.get("train"), dict):
                    spec["train"].pop(path[1], None)
        _apply(content, path, value, ".".join(path))
    _check_sections(content)
    _check_keys(content, Config, "")
    check_texts(content)
    _forget_shipped_data(content.get("data"), said)
    _count_owners(content)
    _add_compared_strategies(content)
    if not trusted:
        refuse_interpolation(content)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), content)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        if "is not a ListConfig" in reason:  # it names classes alone
            reason = "it must be a list, like [0, 1]"
        raise ConfigError(f"{key}: {reason}", expected_at(str(key))) from error
    assert isinstance(result, Config)
    check_choices(result)
    check_left_alone(result)
    check_numbers(result)
    return result


def _is_shipped(config: str) -> bool:
    own = config.startswith(INLINE) or Path(config).suffix in (".yaml", ".yml")
    return not own or not (config.startswith(INLINE) or Path(config).expanduser().is_file())


def _forget_shipped_data(data: Any, said: set[str]) -> None:
    """With data of one's own, what a preset or group says of the shipped ones' columns and sizes does not hold."""
    if not isinstance(data, dict) or data.get("train") is None:
        return
    if data.get("name") != NATURAL_INSTRUCTIONS:
        for key in ABOUT_SHIPPED - said:
            data.pop(key, None)


def _count_owners(content: dict[str, Any]) -> None:
    """A type that names natural clients, and no number of clients, has as many as these."""
    each = (content.get("data") or {}).get("groups_per_client", 1)
    for entry in content.get("types") or []:
        owners = entry.get("owners")
        if isinstance(owners, list) and "clients" not in entry and isinstance(each, int):
            entry["clients"] = max(len(owners) // max(each, 1), 1)


def _check_untrusted(config: str, overrides: str | Sequence[str]) -> None:
    if not config.startswith(INLINE) and config not in presets():
        raise ConfigError.plain(
            "a deployed client takes a preset's name or inline YAML from the server, no file"
        )
    if len(config) + sum(map(len, overrides)) > LONGEST:
        raise ConfigError.plain(
            f"a deployed client takes a configuration of at most {LONGEST} letters from the server"
        )


def _check_sections(content: dict[str, Any]) -> None:
    """Sections are mappings, ``types`` a list, ``strategies`` a mapping by now."""
    for key, value in content.items():
        wanted = list if key == "types" else dict
        if key in _SECTIONS and value is not None and not isinstance(value, wanted):
            kind = "a list of types" if wanted is list else "a mapping"
            raise ConfigError(f"{key} is {value!r}, but must be {kind}", f"{key} must be {kind}")
    for entry in content.get("types") or []:
        if not isinstance(entry, dict):
            need = "write {backbone: ..., bits: ..., clients: ...}"
            raise ConfigError(f"types has {entry!r}; {need}", f"types: {need}")


def _add_compared_strategies(content: dict[str, Any]) -> None:
    """``run.compare`` may name any shipped strategy, listed in the preset or not."""
    strategies = content["strategies"]
    for name in (content.get("run") or {}).get("compare") or ["heterotune"]:
        if name not in strategies:
            strategies[name] = shipped_strategy(str(name), "run.compare", map(str, strategies))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`compose` reads back."""
    structured = OmegaConf.structured(config)
    assert isinstance(structured, DictConfig)
    return OmegaConf.to_yaml(structured)
