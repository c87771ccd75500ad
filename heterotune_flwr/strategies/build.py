"""From a strategy's YAML entry to the strategy; on the server only."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.alignment.views import views_of
from heterotune_flwr.channels.channel import channel_names, read_channels, server_half
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.config.choices import check_choices
from heterotune_flwr.config.components import COMPONENT, import_component
from heterotune_flwr.config.options import read_options
from heterotune_flwr.config.renamed import unknown_key
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.directions import check_directions
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.schema import Config, MethodConfig, TrainConfig
from heterotune_flwr.strategies.heterotune import HeteroTune
from heterotune_flwr.strategies.opening import closed_task
from heterotune_flwr.strategies.strategy import HeteroStrategy


def load_component(path: str, where: str) -> type[HeteroStrategy]:
    """Import the strategy class a dotted path names; ConfigError when it is none."""
    found = import_component(path, where)
    if not (inspect.isclass(found) and issubclass(found, HeteroStrategy)):
        raise ConfigError(f"{where}.{COMPONENT} is {path!r}, which is no HeteroStrategy")
    return found


def strategy_config(name: str, spec: Mapping[str, Any], config: Config) -> Config:
    """Return the run's configuration with the strategy's own ``method`` and ``train`` settings."""
    where = f"strategies.{name}"
    method, train = (spec.get(part, {}) for part in ("method", "train"))
    free = [f.name for f in dataclasses.fields(MethodConfig) if not f.metadata["by_strategy"]]
    return dataclasses.replace(
        config,
        method=read_options(MethodConfig, method, f"{where}.method", config.method, free),
        train=read_options(TrainConfig, train, f"{where}.train", config.train),
    )


def aligned_methods(config: Config) -> list[MethodConfig]:
    """Methods of the compared strategies that need maps; the run's own where none does."""
    labels = label_set(config.data)
    aligned: list[MethodConfig] = []
    for name in config.run.compare:
        spec = config.strategies[name]
        own, entry = strategy_config(name, spec, config), _read_entry(name, spec)
        closed = list(labels or ()) if closed_task(labels, own.train) else []
        halves = [server_half(channel)(options) for channel, options in entry.channels.items()]
        views = own.method.views if any(half.reads_views(closed) for half in halves) else []
        method = dataclasses.replace(own.method, views=views)
        if method.kind == "dema" and method not in aligned:
            aligned.append(method)
    return aligned or [config.method]


def build_strategy(spec: Mapping[str, Any], context: StrategyContext) -> HeteroStrategy:
    """Build the strategy an entry of ``strategies`` describes.

    Parameters
    ----------
    spec
        ``_component_`` (dotted path of a :class:`HeteroStrategy`), optional ``method`` and
        ``train`` settings that replace the run's for this strategy, an optional ``server_optimizer``
        (:class:`ServerOptimizer`), an optional ``robust`` mean inside types (:class:`RobustMean`), and the class's own
        options.
    context
        Name, configuration, seed, session.

    Raises
    ------
    ConfigError
        The path, a key or a value is wrong; the message names the nearest right one.

    """
    entry = _read_entry(context.name, spec)
    own = dataclasses.replace(
        context,
        config=strategy_config(context.name, spec, context.config),
        optimizer=_server_optimizer(context.name, spec, entry.component),
        mean=_robust_mean(context.name, spec, entry.component),
        channels=entry.channels,
    )
    return entry.component(own, **entry.options)


def check_strategy(name: str, spec: Mapping[str, Any], config: Config) -> None:
    """Everything about an entry that can be wrong, before anything runs (ConfigError)."""
    entry = _read_entry(name, spec)
    component, options = entry.component, entry.options
    _server_optimizer(name, spec, component)
    _robust_mean(name, spec, component)
    try:
        component.check_options(options)
        own = strategy_config(name, spec, config)
        check_choices(own)
        views_of(own.method)
        component.check_types({f"{e.backbone}@{e.bits}": e.bits for e in config.types})
        component.check_backbones(config.types, options)
    except ConfigError as error:
        where = f"strategies.{name}"
        named = str(error).startswith(where)
        raise ConfigError(str(error) if named else f"{where}: {error}") from error


def _server_optimizer(
    name: str, spec: Mapping[str, Any], component: type[HeteroStrategy]
) -> ServerOptimizer:
    """Build what the entry's ``server_optimizer`` describes; plain addition where it has none."""
    where = f"strategies.{name}.server_optimizer"
    if "server_optimizer" not in spec:
        return ServerOptimizer()
    if component.own_server_step:
        raise ConfigError(f"{where}: {component.__name__} {component.own_server_step}")
    return read_options(ServerOptimizer, spec["server_optimizer"], where)


def _robust_mean(name: str, spec: Mapping[str, Any], component: type[HeteroStrategy]) -> RobustMean:
    """Read the entry's ``robust``; the weighted mean where it has none."""
    where = f"strategies.{name}.robust"
    if spec.get("robust") is None:
        return RobustMean()
    if component.combine not in (HeteroStrategy.combine, HeteroTune.combine):
        raise ConfigError(
            f"{where}: {component.__name__} combines updates in its own way, which no other mean can replace"
        )
    given = spec["robust"]
    given = {"rule": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or "rule" not in given:
        raise ConfigError(f"{where} is {given!r}; write a rule's name, or rule: and options")
    return read_options(RobustMean, given, where)


@dataclass(frozen=True)
class _Entry:
    """What an entry says: the class, its own options, and those of the channels that are on."""

    component: type[HeteroStrategy]
    options: dict[str, Any]
    channels: dict[str, Any]


def _read_entry(name: str, spec: Mapping[str, Any]) -> _Entry:
    where = f"strategies.{name}"
    if not isinstance(spec, Mapping) or COMPONENT not in spec:
        raise ConfigError(f"{where} lacks _component_, the dotted path of its class")
    component = load_component(str(spec[COMPONENT]), where)
    common = ["method", "train", "server_optimizer", "robust"]
    reserved = {COMPONENT, *common}
    options = {str(key): value for key, value in spec.items() if key not in reserved}
    own = [key for key in inspect.signature(component).parameters if key != "context"]
    names = channel_names()
    given = {key: options.pop(key) for key in list(options) if key in names and key not in own}
    for key in options:
        if key not in own:
            raise unknown_key(where, key, [*own, *names, *common], "strategy")
    try:
        return _Entry(component, options, read_channels(component.channel_entries(given)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_strategies(config: Config) -> None:
    """Refuse unknown or misspelt strategies before anything runs (ConfigError)."""
    check_directions(config.exchange)
    for name in config.run.compare:
        if name not in config.strategies:
            known = ", ".join(sorted(config.strategies)) or "none"
            raise ConfigError(f"run.compare names {name!r}; strategies of this run: {known}")
        spec = config.strategies[name]
        check_strategy(name, spec, config)
