"""Finds out who a client is, from what its node and the run say (no torch here).

In a simulation a node knows only its partition; the run's configuration says the rest. A deployed
client's own node configuration (``flower-supernode --node-config``) says everything about its
machine: ``client-id``, ``backbone``, ``bits``, ``data``, ``state-dir``, and optionally ``test``,
``anchors``, ``revision``, ``threads``, ``memory-gb``, ``slots``, ``format``, ``text-field``,
``label-field``, ``references-field``, ``report``, ``answers``, ``class-sums``, ``details``, ``guest``,
``code-hash``, ``floor-...`` (:mod:`.floors`), and ``worker``, ``worker-idle-minutes`` (:mod:`heterotune_flwr.worker`);
``heterotune node start`` writes it from the node's file. It takes no path from the server, and
nothing of its data answers the server: its columns are named here, its labels by the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import heterotune_flwr
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.bits import resolve_spec
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.client.floors import Floors
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.client.node_keys import CLIENT, REQUIRED
from heterotune_flwr.data.sources import is_shipped, label_set, public_labels
from heterotune_flwr.data.virtual_clients import expand_types, owners_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import choices_of
from heterotune_flwr.names import ID_RULE, is_id
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.schema import Config, DataConfig

#: What the configuration of a deployed client says in words.
_WORDS = (
    "client-id", "backbone", "bits", "revision", "data", "format", "test", "anchors", "state-dir", "text-field",
    "label-field", "references-field", "slots", "code-hash",
)  # fmt: skip


def is_simulated(node_config: Mapping[str, Any]) -> bool:
    """Whether a node is a virtual client of this machine's own simulation."""
    return "partition-id" in node_config


def identify(config: Config, node_config: Mapping[str, Any], run_id: int | str = 0) -> Identity:
    """Return the identity of the node with this node configuration.

    Raises
    ------
    ConfigError
        A deployed client does not say enough, or a simulation has another number of nodes than
        the types have clients.
    BackboneError
        Unknown bits, or ``auto`` and no format fits the client's memory.

    """
    if not is_simulated(node_config):
        return _deployed(config, node_config, run_id)
    partition, count = int(node_config["partition-id"]), int(node_config["num-partitions"])
    order = expand_types(config.types)
    if len(order) != count:
        raise ConfigError(
            f"the simulation has {count} nodes but the types have {len(order)} clients; set "
            f"num-supernodes={len(order)} or change types.*.clients"
        )
    mine = order[partition]
    state_dir = _simulated_state_dir(config, run_id)
    return Identity(
        client_id=f"client-{partition:04d}",
        spec=_spec(mine.backbone, mine.bits, mine.revision, mine.memory_gb, state_dir, run_id),
        data=config.data,
        state_dir=state_dir,
        partition=(partition, count),
        owners=owners_of(config),
        threads=config.run.worker_threads,
        memory_gb=mine.memory_gb,
        slots=mine.slots,
        guest=mine.guest,
    )


def _simulated_state_dir(config: Config, run_id: int | str) -> Path:
    if config.run.state_dir is not None:
        return Path(config.run.state_dir).expanduser()
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser() / "state"
    return cache_dir() / "state" / f"run-{run_id}"


def about_shipped(data: DataConfig) -> bool:
    """Whether a run of real nodes is about a shipped data set, whose test then measures all of them."""
    if not is_shipped(data.name) or data.train is not None:
        return False
    return data.labels is None or data.labels == label_set(DataConfig(name=data.name))


def _deployed(config: Config, node_config: Mapping[str, Any], run_id: int | str) -> Identity:
    _check_words(node_config)
    guest = _choice(node_config, "guest") == "yes"
    missing = [key for key in required_of(guest) if not node_config.get(key)]
    if missing:
        raise ConfigError.plain(
            f"the node configuration lacks {', '.join(missing)}; start the client with "
            'flower-supernode --node-config \'client-id="..." backbone="..." bits="..." '
            'data="..." state-dir="..."\''
        )
    if not is_id(str(node_config["client-id"])):
        raise ConfigError.of(
            "client-id in the node configuration", str(node_config["client-id"])[:80], ID_RULE
        )
    check_code(str(node_config.get("code-hash") or ""))
    report = _choice(node_config, "report")
    answers = _choice(node_config, "answers")
    sums = _choice(node_config, "class-sums")
    anchors = node_config.get("anchors")
    state_dir = Path(str(node_config["state-dir"])).expanduser()
    memory_gb = _memory_gb(node_config)
    return Identity(
        client_id=str(node_config["client-id"]),
        spec=_spec(
            str(node_config["backbone"]),
            str(node_config.get("bits", CLIENT["bits"].default)),
            str(node_config["revision"]) if node_config.get("revision") else None,
            memory_gb,
            state_dir,
            run_id,
        ),
        data=_own_data(config, node_config),
        state_dir=state_dir,
        threads=int(
            node_config.get("threads") or min(config.run.worker_threads, os.cpu_count() or 1)
        ),
        anchors=str(anchors) if anchors else None,
        memory_gb=memory_gb,
        slots=str(node_config["slots"]) if node_config.get("slots") else None,
        report=report,
        answers=answers == "yes",
        class_sums=sums == "yes",
        losses=tuple(filter(None, re.split(r"[,\s]+", str(node_config.get("losses") or "")))),
        details=_choice(node_config, "details"),
        guest=guest,
        floors=Floors.of(node_config),
    )


def _own_data(config: Config, node_config: Mapping[str, Any]) -> DataConfig:
    """The run's data settings with the node's own files and columns in them."""
    test = node_config.get("test")
    return dataclasses.replace(
        config.data,
        name=_named(config.data),
        train=str(node_config["data"]) if node_config.get("data") else None,
        test=str(test) if test else None,
        text_field=str(node_config.get("text-field", "text")),
        label_field=str(node_config.get("label-field") or "label"),
        references_field=str(node_config.get("references-field") or "references"),
        client_field="client",
        format=str(node_config["format"]) if node_config.get("format") else None,
        labels=public_labels(config.data),
        max_labels=0,
        # Of its own test file a run cannot choose how much is told.
        global_test_examples=(
            DataConfig().global_test_examples if test else config.data.global_test_examples
        ),
    )


def _check_words(node_config: Mapping[str, Any]) -> None:
    """Refuse 007, 1234e5 and true where a text is meant: Flower reads what has no quotes as a number (ConfigError)."""
    for key in _WORDS:
        value = node_config.get(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError.of(
                f"{key} in the node configuration",
                value,
                'it is a text; write it in quotes: key="..."',
            )


def _named(data: DataConfig) -> str:
    """The data set that a deployed client's examples are of: a shipped one only where the run is about it."""
    return "own" if is_shipped(data.name) and not about_shipped(data) else data.name


def required_of(guest: bool) -> tuple[str, ...]:
    """What a deployed client must say: a guest needs no data."""
    needed = (key for key, field in CLIENT.items() if field.default == REQUIRED)
    return tuple(key for key in needed if key != "data" or not guest)


def _choice(node_config: Mapping[str, Any], key: str) -> str:
    """Return a value of a deployed client's configuration that is one of a few."""
    choices = choices_of(CLIENT[key])
    value = str(node_config.get(key) or CLIENT[key].default)
    if value not in choices:
        raise ConfigError.of(
            f"{key} in the node configuration", value, f"choose one of {', '.join(choices)}"
        )
    return value


def check_code(accepted: str) -> None:
    """Refuse to work for a run whose code is not the one this machine's owner has installed.

    Flower hands every client the run's own copy of this package, and that copy asks this question: it keeps an upgrade
    of the server from changing what nodes run unnoticed, not a hostile server from doing so.

    Raises
    ------
    ConfigError
        ``accepted`` is given and differs from :func:`code_hash`.

    """
    if accepted and accepted != code_hash():
        raise ConfigError.plain(
            f"the run brings heterotune-flwr {heterotune_flwr.__version__} with code {code_hash()}, but this node "
            f"accepts only code {accepted}, which it has installed; install the server's version on the node and "
            'restart it (or set accept-code = "any" in its node.toml)'
        )


def _spec(
    source: str,
    bits: str,
    revision: str | None,
    memory_gb: float | None,
    state_dir: Path,
    run_id: int | str,
) -> BackboneSpec:
    """The spec a client has for a whole run, although every message may meet a fresh process."""
    name = hashlib.sha256(json.dumps([source, revision]).encode()).hexdigest()[:12]
    kept = state_dir / "auto-bits" / f"{run_id}-{name}"
    return resolve_spec(source, bits, revision, memory_gb, kept=kept)


def _memory_gb(node_config: Mapping[str, Any]) -> float | None:
    """Memory budget of a deployed client in GB (10^9 bytes), None without one."""
    given = node_config.get("memory-gb")
    if given is None or given == "":
        return None
    try:
        budget = float(given)
    except (TypeError, ValueError):
        budget = 0.0
    if not 0.0 < budget < float("inf"):
        raise ConfigError.of(
            "memory-gb in the node configuration", given, "give a number of GB, like memory-gb=7.5"
        )
    return budget
