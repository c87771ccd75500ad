"""Who a client is: its id, backbone, data and state directory (no torch here).

In a simulation a node knows only its partition; the run's configuration says the rest. A deployed
client's own node configuration (``flower-supernode --node-config``) says everything about its
machine: ``client-id``, ``backbone``, ``bits``, ``data``, ``state-dir``, and optionally ``test``,
``anchors``, ``revision``, ``threads``, ``memory-gb``, ``slots``, ``format``, ``text-field``,
``label-field``, ``references-field``, ``report``, ``answers``, ``class-sums``, ``guest``, ``code-hash``, ``floor-...``
(:mod:`.floors`), and ``worker``, ``worker-idle-minutes`` (:mod:`heterotune_flwr.worker`);
``heterotune node start`` writes it from the node's file. It takes no path from the server, and
nothing of its data answers the server: its columns are named here, its labels by the run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import heterotune_flwr
from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.bits import resolve_spec
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.client.floors import MOST_HELD, Floors
from heterotune_flwr.client.holdout import split, whole_test
from heterotune_flwr.client.node_book import NodeBook
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData, client_examples, own_examples
from heterotune_flwr.data.sources import global_test, is_shipped, label_set, public_labels
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.names import ID_RULE, is_id
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.schema import (
    NATURAL_INSTRUCTIONS,
    AlignmentConfig,
    Config,
    DataConfig,
    TypeConfig,
)

#: What a deployed client must say about itself.
REQUIRED = ("client-id", "backbone", "data", "state-dir")
#: How much a deployed client tells beside its update; with the second one only :data:`COUNTED`.
REPORTS = ("all", "counts-and-loss-only")
#: Whether answers that a deployed client's model writes on public prompts may leave it.
ANSWERS = ("no", "yes")
#: Whether what a deployed client tells of its classes (how many examples, sums of their latents) may leave it.
CLASS_SUMS = ("no", "yes")
#: Examples of a class that a deployed client's sum is of at least: that of one would be the example's own latents.
FEWEST = 2
#: Whether a deployed client has no labelled examples, or keeps them all for its own test.
GUEST = ("no", "yes")
#: What always leaves: the server weighs and checks updates by the first three.
COUNTED = ("examples", "steps", "learning_rate", "loss")


@dataclass(frozen=True)
class Identity:
    """A client of a run.

    ``data`` is the run's data configuration with this client's own files in it; ``partition`` is
    (partition id, number of partitions) in a simulation, None in a deployment. ``answers``: whether what its model
    writes on public prompts may leave it, ``class_sums``: whether its classes' counts and sums may; a deployed client's
    owner must say so. ``guest``: it trains on no example of its own. ``floors``: what a deployed client holds to, None
    in a simulation.
    """

    client_id: str
    spec: BackboneSpec
    data: DataConfig
    state_dir: Path
    partition: tuple[int, int] | None = None
    threads: int = 1
    anchors: str | None = None
    memory_gb: float | None = None
    slots: str | None = None
    report: str = "all"
    answers: bool = True
    class_sums: bool = True
    guest: bool = False
    floors: Floors | None = None

    def reported(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics this client lets go; of tests (``personal_loss``, ...) likewise counts and losses."""
        if self.report == "all":
            return dict(metrics)
        return {
            name: value
            for name, value in metrics.items()
            if name.removeprefix("global_").removeprefix("personal_") in COUNTED
        }

    def allowed_min_count(self, requested: int) -> int:
        """Return of which classes the server may know, by their fewest examples; 0: of none, the owner forbids it.

        A deployed client never tells of fewer than :data:`FEWEST`, whatever is asked.
        """
        if not self.class_sums or requested < 1:
            return 0
        return requested if self.partition is not None else max(requested, FEWEST)

    def alignment(self, config: Config) -> AlignmentConfig:
        """Alignment settings with this client's own anchor file in them.

        Raises
        ------
        ConfigError
            The run names an anchor file and this deployed client has not agreed to one.

        """
        if self.anchors is not None:
            return dataclasses.replace(config.alignment, anchors=self.anchors)
        if self.partition is None and config.alignment.anchors not in SHIPPED:
            need = (
                "a deployed client reads no path from the server: name the file with anchors in its node "
                f"configuration, or take one of {', '.join(SHIPPED)}"
            )
            raise ConfigError(
                f"the run aligns on the anchor file {config.alignment.anchors!r}; {need}",
                f"alignment.anchors: {need}",
            )
        return config.alignment

    def global_test(self) -> list[Example]:
        """Return the run's common test; nothing where a deployed client has none (DataError as in :mod:`..data`).

        A deployed client's is its own test file, of which a run chooses no rows (:mod:`.holdout`); without one the
        shipped test, where the run is about a shipped set.
        """
        data = self.data
        if self.partition is not None or data.name == NATURAL_INSTRUCTIONS:
            return global_test(data)
        if data.test is not None:
            found = global_test(dataclasses.replace(data, generate=MOST_HELD))
            return whole_test(found, self.account(data.test), self.book, self.floors or Floors())
        if not is_shipped(data.name):
            return []
        return global_test(
            DataConfig(
                name=data.name,
                labels=data.labels,
                max_labels=data.max_labels,
                global_test_examples=data.global_test_examples,
            )
        )

    def examples(self, seed: int) -> ClientData:
        """Return the client's own examples for a run's seed (DataError as in :mod:`..data`).

        A guest trains on none: in a simulation those it would have lie idle, so that the others' are the same with and
        without it; a deployed one's file, where it has any, is its own test. A deployed client's split is its own, for
        every run and seed the same (:mod:`.holdout`).
        """
        if self.partition is not None:
            found = client_examples(self.data, *self.partition, seed)
            return ClientData([], found.personal_test) if self.guest else found
        if self.data.train is None:
            return ClientData([], [])
        pool = own_examples(self.data)
        account = self.account(self.data.train)
        return split(pool, account, self.book, self.floors or Floors(), self.guest)

    def examples_key(self, seed: int) -> tuple[str, ...]:
        """What :meth:`examples` depends on, the settings in ``data`` apart."""
        if self.partition is not None or self.data.train is None:
            return (self.client_id, repr(self.partition), str(seed), str(self.guest))
        return (self.client_id, str(self.state_dir), self.stamp(self.data.train), str(self.guest))

    @cached_property
    def book(self) -> NodeBook:
        """What this deployed client must not forget."""
        return NodeBook(self.state_dir)

    def stamp(self, path: str) -> str:
        """When a file of this client was last written; empty where it is not there."""
        file = Path(path).expanduser()
        return str(file.stat().st_mtime_ns) if file.exists() else ""

    def account(self, path: str) -> str:
        """Under which name the book counts what is asked about a file: one that says nothing of where it lies."""
        return self.book.keyed(f"file {Path(path).expanduser().resolve()}")


def expand_types(types: Sequence[TypeConfig]) -> list[TypeConfig]:
    """Type of every simulated client: the types in turn, each until it has its number of clients."""
    return [types[index] for index in _turns(tuple(item.clients for item in types))]


@functools.lru_cache(maxsize=16)
def _turns(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Index of the type of every client, in turn."""
    left, order = list(counts), []
    while any(left):
        for index in range(len(left)):
            if left[index] > 0:
                left[index] -= 1
                order.append(index)
    return tuple(order)


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
    order = _turns(tuple(item.clients for item in config.types))
    if len(order) != count:
        raise ConfigError(
            f"the simulation has {count} nodes but the types have {len(order)} clients; set "
            f"num-supernodes={len(order)} or change types.*.clients"
        )
    mine = config.types[order[partition]]
    state_dir = _simulated_state_dir(config, run_id)
    return Identity(
        client_id=f"client-{partition:04d}",
        spec=_spec(mine.backbone, mine.bits, mine.revision, mine.memory_gb, state_dir, run_id),
        data=config.data,
        state_dir=state_dir,
        partition=(partition, count),
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
    guest = _choice(node_config, "guest", GUEST) == "yes"
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
    report = _choice(node_config, "report", REPORTS)
    answers = _choice(node_config, "answers", ANSWERS)
    sums = _choice(node_config, "class-sums", CLASS_SUMS)
    test, anchors = node_config.get("test"), node_config.get("anchors")
    state_dir = Path(str(node_config["state-dir"])).expanduser()
    memory_gb = _memory_gb(node_config)
    return Identity(
        client_id=str(node_config["client-id"]),
        spec=_spec(
            str(node_config["backbone"]),
            str(node_config.get("bits", "bf16")),
            str(node_config["revision"]) if node_config.get("revision") else None,
            memory_gb,
            state_dir,
            run_id,
        ),
        data=dataclasses.replace(
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
        ),
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
        guest=guest,
        floors=Floors.of(node_config),
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
    return tuple(key for key in REQUIRED if key != "data" or not guest)


def _choice(node_config: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    """Return a value of a deployed client's configuration, the first choice by default."""
    value = str(node_config.get(key) or choices[0])
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
