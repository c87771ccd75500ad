"""Preflight: what can be known to be wrong before any weights are loaded or any process is started."""

from __future__ import annotations

import copy
from typing import Any

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.bits import check_bits, resolve_spec
from heterotune_flwr.backbones.files import has_weights
from heterotune_flwr.backbones.headers import tensor_headers
from heterotune_flwr.backbones.quantized import check_stored_bits
from heterotune_flwr.backbones.sources import describe_source, resolve_source
from heterotune_flwr.backbones.tokenizer import (
    check_positions,
    learned_positions,
    load_tokenizer,
)
from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import global_test, label_set
from heterotune_flwr.data.template import make_form
from heterotune_flwr.data.virtual_clients import owners_of
from heterotune_flwr.errors import BackboneError, ConfigError, DataError, one_line
from heterotune_flwr.federation.sampling import sample_size
from heterotune_flwr.own_data import own_data
from heterotune_flwr.schema import Config
from heterotune_flwr.strategies.build import check_strategies, strategy_config
from heterotune_flwr.track.trackers import check_trackers
from heterotune_flwr.tuning.slots import lowest_slot


def settle_bits(config: Config) -> Config:
    """``config`` with ``bits: auto`` replaced, so that every process of a run has the same answer.

    Raises
    ------
    BackboneError
        A backbone is unknown, damaged, or does not fit its budget at any bits.

    """
    settled = copy.deepcopy(config)
    for entry in settled.types:
        spec = resolve_spec(entry.backbone, entry.bits, entry.revision, entry.memory_gb)
        entry.bits = spec.bits
    return settled


def preflight(config: Config) -> list[str]:
    """Check a run (:func:`checked`); what its owner should know of data of their own, line by line."""
    return own_data(config, checked(config))


def checked(config: Config) -> dict[str, Any]:
    """Check a simulated run as far as possible without loading weights (a second or two).

    Returns
    -------
    The tokenizer of every backbone, by its name.

    Raises
    ------
    ConfigError
        No types, an unknown strategy or option, a task that does not fit the output maps.
    BackboneError
        An unknown, unfetched or truncated backbone, bits this device cannot do, more slots than blocks.
    DataError
        A file or column is missing, a client's shard would be empty, two labels are the same tokens.

    """
    if not config.types:
        raise ConfigError("types is empty: name at least one backbone with its bits and clients")
    check_strategies(config)
    check_trackers(config.run.track)
    _check_backbones(config)
    labels = label_set(config.data)
    if not labels and config.alignment.output == "labels" and config.method.kind == "dema":
        raise ConfigError(
            "the task has no closed label set (see data.labels and data.max_labels), so alignment.output must be "
            "'vocabulary'"
        )
    if config.data.generate and labels and config.train.loss != "tokens":
        raise ConfigError(
            "data.generate is for open text, but the answers are a closed label set; set data.max_labels=0 (or "
            "train.loss=tokens), or data.generate=0"
        )
    if config.data.train is None and config.data.test is not None:
        raise DataError("data.test is for a training file of your own: give it with data.train")
    load_anchors(config.alignment)
    global_test(config.data)
    total = sum(entry.clients for entry in config.types)
    learners = sum(entry.clients for entry in config.types if not entry.guest)
    if not learners:
        raise ConfigError(
            "every type is a guest: somebody must train; set types.*.guest=false of one"
        )
    if (config.server.min_clients or 0) > total:
        raise ConfigError(
            f"server.min_clients is {config.server.min_clients}, but the types have {total} clients: such a run would "
            "wait in vain"
        )
    asked = sample_size(learners, config.server.participation)
    if config.server.min_results > asked:
        raise ConfigError(
            f"server.min_results is {config.server.min_results}, but a round asks {asked} of the {learners} clients "
            "that train; no round could ever count"
        )
    for seed in config.run.seeds:
        for partition in range(total):
            client_examples(config.data, partition, total, seed, owners_of(config))
    tokenizers = _tokenizers(config)
    if labels and (config.train.loss != "tokens" or config.alignment.output == "labels"):
        _check_labels(config, labels, tokenizers)
    return tokenizers


def _check_backbones(config: Config) -> None:
    lowest_slot(config.train.slots, config.method.slots)
    for name in config.run.compare:
        own = strategy_config(name, config.strategies[name], config)
        try:
            lowest_slot(own.train.slots, own.method.slots)
        except ConfigError as error:
            raise ConfigError(f"strategies.{name}.train: {error}") from error
    for entry in settle_bits(config).types:
        check_bits(entry.bits)
        lowest_slot(entry.slots or config.train.slots, config.method.slots)
        if not entry.backbone.endswith(".gguf"):
            directory = resolve_source(entry.backbone, entry.revision, config_only=True)
            check_stored_bits(entry.backbone, directory, entry.bits)
            if has_weights(directory):  # those of a hub id may come later
                tensor_headers(entry.backbone, directory)
    shapes = {e.backbone: describe_source(e.backbone, e.revision) for e in config.types}
    shallowest = min(shapes, key=lambda name: shapes[name].layers)
    depth = shapes[shallowest].layers
    if config.method.slots > depth:
        raise BackboneError(
            f"method.slots is {config.method.slots}, but the shallowest backbone, {shallowest}, has {depth} blocks; "
            f"use at most {depth}"
        )


def _tokenizers(config: Config) -> dict[str, Any]:
    """The tokenizer of every backbone, by its name; each fits its weights, and the data's length and form."""
    found = {}
    for entry in config.types:
        directory = resolve_source(entry.backbone, entry.revision)
        shape = describe_source(entry.backbone, entry.revision)
        try:
            found[entry.backbone] = load_tokenizer(entry.backbone, directory, shape.vocabulary)
        except BackboneError:
            raise
        except Exception as error:  # damaged files make the library raise whatever it likes
            reason = one_line(error)
            raise BackboneError(
                f"the tokenizer of backbone {entry.backbone!r} cannot be read from {directory} ({reason})"
            ) from error
        tensors = tensor_headers(entry.backbone, directory)
        tables = ((tensor.name, tensor.shape) for tensor in tensors)
        positions = learned_positions(tables, shape.positions)
        check_positions(entry.backbone, positions, config.data.max_length)
        try:
            make_form(found[entry.backbone], config.data)
        except ConfigError as error:
            raise ConfigError(f"backbone {entry.backbone}: {error}") from error
    return found


def _check_labels(config: Config, labels: list[str], tokenizers: dict[str, Any]) -> None:
    for name, tokenizer in tokenizers.items():
        try:
            make_trie(make_form(tokenizer, config.data), labels)
        except DataError as error:
            raise DataError(f"backbone {name}: {error}") from error
