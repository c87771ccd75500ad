"""What values of a configuration are allowed, where types cannot say it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from heterotune_flwr.alignment.views import VIEWS
from heterotune_flwr.backbones.sources import AUTO, BITS
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.codecs import codec_names
from heterotune_flwr.exchange.directions import check_directions
from heterotune_flwr.plugins import plugin_names
from heterotune_flwr.schema import Config

#: dotted key -> allowed values
CHOICES: dict[str, tuple[str, ...]] = {
    "data.partition": ("dirichlet", "iid", "natural"),
    "method.kind": ("dema", "lora", "submodel"),
    "method.activation": ("silu", "linear"),
    "method.gate": ("dense", "top1", "uniform"),
    "method.gate_scope": ("client", "type", "global"),
    "method.core_kind": ("square", "lora"),
    "method.core_scope": ("type", "client"),
    "alignment.positions": ("answer", "words"),
    "alignment.output": ("labels", "vocabulary"),
    "alignment.control": ("none", "random_down", "random_up", "random_maps", "rotated_basis"),
    "exchange.resend": ("changed", "always"),
    "train.loss": ("auto", "labels", "tokens"),
    "train.optimizer": ("adamw", "sgd"),
}
#: dotted key -> smallest allowed value
MINIMA: dict[str, float] = {
    "method.slots": 1, "method.latent": 1, "method.inner": 0, "method.experts_global": 0,
    "method.experts_type": 0, "method.experts_private": 0, "method.lora_rank": 1,
    "method.core_rank": 0, "method.core_from": 0,
    "data.personal_test_examples": 0, "data.global_test_examples": 0,
    "data.max_length": 8, "data.generate": 0, "data.max_answer_tokens": 1, "data.groups_per_client": 1,
    "data.instances_per_task": 1, "data.demonstrations": 0,
    "train.local_steps": 1, "train.batch_size": 1, "server.rounds": 1,
    "server.evaluate_every": 0, "server.keep_checkpoints": 0, "server.min_results": 1, "server.cooldown_after": 0,
    "server.give_up_after": 0,
    "server.cooldown_longest": 1, "server.deadline_floor_seconds": 0, "server.grace_seconds": 0,
    "server.oversample": 0, "alignment.count": 10, "alignment.components": 1,
    "train.logit_adjustment": 0, "train.proximal": 0, "train.gate_rate": 0,
    "train.warmup_ratio": 0,
    "run.worker_threads": 1,
}  # fmt: skip
_NULLABLE = ("exchange.up", "exchange.down")
#: dotted key -> what a value that is not null must be above
_ABOVE: dict[str, float] = {
    "server.norm_limit": 1, "server.norm_ceiling": 1, "server.deadline_factor": 1, "server.quorum": 0,
    "server.query_seconds": 0, "server.min_clients": 0,
    "server.evaluate_clients": 0,
    "data.examples_per_client": 0,
}  # fmt: skip
_POSITIVE = (
    "server.timeout_seconds", "server.wait_seconds", "data.alpha", "train.learning_rate", "train.clip_norm",
    "train.last_rate", "train.prior_smoothing", "method.lora_alpha", "method.core_scale",
)  # fmt: skip


def nearest(word: str, choices: Sequence[str]) -> str:
    """``; did you mean 'this'?``, or nothing where no choice is near."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _not_among(where: str, value: object, allowed: Sequence[str]) -> ConfigError:
    return ConfigError.of(
        where, value, f"choose from {', '.join(allowed)}{nearest(str(value), allowed)}"
    )


def _value(config: Config, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def check_choices(config: Config) -> None:
    """Values that types cannot express; raises ConfigError with the nearest right one."""
    codecs = dict.fromkeys(("exchange.codec", "exchange.up", "exchange.down"), codec_names())
    for path, allowed in {**CHOICES, **codecs}.items():
        value = _value(config, path)
        if value not in allowed and (path not in _NULLABLE or value is not None):
            raise _not_among(path, value, allowed)
    for name in config.method.views:
        if name not in list(VIEWS):
            raise _not_among("method.views", name, tuple(VIEWS))
    if len(set(config.method.views)) != len(config.method.views):
        raise ConfigError.of("method.views", config.method.views, "name each once")
    losses = config.train.losses and plugin_names("losses")
    for name, options in config.train.losses.items():
        if name not in losses:
            raise _not_among("train.losses", name, losses or ("those of installed packages",))
        if not isinstance(options, dict):
            raise ConfigError.of(f"train.losses.{name}", options, "give its options, or {}")
    for index, entry in enumerate(config.types):
        bits = (*BITS, AUTO)
        if entry.bits not in bits:
            raise _not_among(f"types.{index}.bits", entry.bits, bits)
        if entry.clients < 1:
            raise ConfigError.of(f"types.{index}.clients", entry.clients, "it must be at least 1")
        if entry.memory_gb is not None and not 0.0 < entry.memory_gb < float("inf"):
            raise ConfigError.of(f"types.{index}.memory_gb", entry.memory_gb, "it must be above 0")
    for path, minimum in MINIMA.items():
        if not (value := _value(config, path)) >= minimum:  # NaN neither
            raise ConfigError.of(path, value, f"it must be at least {minimum}")
    for path in _POSITIVE:
        if not (value := _value(config, path)) > 0:  # NaN neither
            raise ConfigError.of(path, value, "it must be above 0")
    if config.train.last_rate > 1:
        raise ConfigError.of("train.last_rate", config.train.last_rate, "it must be in (0, 1]")
    if config.train.warmup_ratio > 1:
        raise ConfigError.of(
            "train.warmup_ratio", config.train.warmup_ratio, "it must be in [0, 1]"
        )
    check_directions(config.exchange)
    labels = config.data.labels
    if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise ConfigError.of("data.labels", labels, "name at least two answers, each once")
    for path, bound in _ABOVE.items():
        value = _value(config, path)
        if value is not None and not bound < value < float("inf"):
            raise ConfigError.of(path, value, f"it must be above {bound} (or null)")
    tested = config.server.evaluate_clients
    if tested is not None and tested > 1 and tested != int(tested):
        raise ConfigError.of(
            "server.evaluate_clients", tested, "give a number of clients, or a share below 1"
        )
    if config.server.oversample > 1:
        raise ConfigError.of("server.oversample", config.server.oversample, "it must be in [0, 1]")
    if config.server.quorum is not None and config.server.quorum > 1:
        raise ConfigError.of("server.quorum", config.server.quorum, "it must be in (0, 1] or null")
    if not 0 < config.server.participation <= 1:
        raise ConfigError.of(
            "server.participation", config.server.participation, "it must be in (0, 1]"
        )
    if config.data.generate and config.data.max_answer_tokens >= config.data.max_length:
        raise ConfigError.of(
            "data.max_answer_tokens",
            config.data.max_answer_tokens,
            "it must be below data.max_length",
        )
    if not 0 < config.data.test_share < 1:
        raise ConfigError.of(
            "data.test_share", config.data.test_share, "it must be between 0 and 1"
        )
    if config.method.core_from >= 1:
        raise ConfigError.of("method.core_from", config.method.core_from, "it must be below 1")
    if config.run.workers is not None and config.run.workers < 1:
        raise ConfigError.of("run.workers", config.run.workers, "it must be at least 1 (or null)")
    method = config.method
    if method.experts_global + method.experts_type + method.experts_private < 1:
        raise ConfigError.plain("method has no experts: set method.experts_global to at least 1")
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
