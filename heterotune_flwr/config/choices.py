"""What values of a configuration are allowed, where types cannot say it."""

from __future__ import annotations

import dataclasses
import re

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import check_fields, nearest
from heterotune_flwr.plugins import plugin_names
from heterotune_flwr.schema import CODECS, Config, MethodConfig

#: Sends the largest numbers alone.
_TOPK = CODECS[-1]


def check_choices(config: Config) -> None:
    """Values that types cannot express; raises ConfigError with the nearest right one."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if dataclasses.is_dataclass(part):
            check_fields(part, section.name)
    for index, entry in enumerate(config.types):
        check_fields(entry, f"types.{index}")
    _check_data(config)
    _check_owners(config)
    _check_run(config)
    if len(set(config.method.views)) != len(config.method.views):
        raise ConfigError.of("method.views", config.method.views, "name each once")
    if config.exchange.codec == _TOPK and config.exchange.down is None:
        raise ConfigError.plain(
            f"{_TOPK} would leave out most of the values a client starts from; it is for updates alone: set "
            f"exchange.up={_TOPK} and exchange.codec=bf16 (or int8, nf4)"
        )
    losses = config.train.losses and plugin_names("losses")
    for name, options in config.train.losses.items():
        if name not in losses:
            known = ", ".join(losses) or "those of installed packages"
            need = f"choose from {known}{nearest(name, losses)}"
            raise ConfigError.of("train.losses", name, need)
        if not isinstance(options, dict):
            raise ConfigError.of(f"train.losses.{name}", options, "give its options, or {}")
    tested = config.server.evaluate_clients
    if tested is not None and tested > 1 and tested != int(tested):
        raise ConfigError.of(
            "server.evaluate_clients", tested, "give a number of clients, or a share below 1"
        )


def check_left_alone(config: Config) -> None:
    """Refuse what strategies alone set (ConfigError)."""
    for field in dataclasses.fields(MethodConfig):
        value = getattr(config.method, field.name)
        if field.metadata["by_strategy"] and value != field.default:
            raise ConfigError.of(f"method.{field.name}", value, "leave it out: strategies set it")


def _check_data(config: Config) -> None:
    labels = config.data.labels
    if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise ConfigError.of("data.labels", labels, "name at least two answers, each once")
    if config.data.generate and config.data.max_answer_tokens >= config.data.max_length:
        raise ConfigError.of(
            "data.max_answer_tokens",
            config.data.max_answer_tokens,
            "it must be below data.max_length",
        )


def _check_owners(config: Config) -> None:
    """Natural clients that types name: each once, and as many as their clients hold."""
    each, taken = config.data.groups_per_client, dict[str, str]()
    for index, entry in enumerate(config.types):
        if entry.owners is None:
            continue
        where = f"types.{index}.owners"
        if config.data.partition != "natural":
            raise ConfigError.of(
                where, entry.owners, "natural clients are dealt by data.partition=natural alone"
            )
        if len(entry.owners) != entry.clients * each:
            of = f" of data.groups_per_client={each}" if each > 1 else ""
            raise ConfigError.of(
                where,
                entry.owners,
                f"{len(entry.owners)} named for {entry.clients} clients{of}: name {entry.clients * each}, or set "
                f"types.{index}.clients",
            )
        for name in entry.owners:
            if name in taken:
                raise ConfigError.of(where, name, f"it is owned by {taken[name]} already")
            taken[name] = where


def _check_run(config: Config) -> None:
    if not config.run.seeds or not config.run.compare:
        raise ConfigError.plain("run.seeds and run.compare must not be empty")
    if min(config.run.seeds) < 0:
        raise ConfigError.of("run.seeds", config.run.seeds, "a seed is 0 or more")
    for key, entries in (("seeds", config.run.seeds), ("compare", config.run.compare)):
        if len(set(map(str, entries))) != len(entries):  # they name the clients' files
            raise ConfigError.of(f"run.{key}", entries, "an entry twice")
    for name in (config.run.name, *config.run.compare):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            need = "cannot be part of a file name; use letters, digits, - and _"
            raise ConfigError(f"the name {name!r} {need}", f"run.name or run.compare {need}")
