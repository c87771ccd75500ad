"""What the owner of a deployed node may say of it: the tables [server] and [client] of its node.toml.

``heterotune node start`` hands [client] on as ``flower-supernode --node-config``. The third table, [floors], is
:mod:`.floors`. No torch here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.data.tables import FORMS
from heterotune_flwr.fields import option
from heterotune_flwr.protocol.details import COUNTS, TEXTS
from heterotune_flwr.schema import AUTO, BITS

#: Where a key has to be given.
REQUIRED = "???"
_NO_YES = ("no", "yes")


@dataclass(frozen=True)
class ServerTable:
    """The server that a deployed node joins."""

    address: str = option(REQUIRED, "host:port of the server")
    ca: str = option("ca.crt", "certificate by which the server is recognised")
    key: str = option("node.key", "private key by which this node is recognised; it never leaves")
    port: int = option(
        9094,
        "of this machine's loopback interface; another one for a second node here [TCP port]",
    )
    accept_code: str = option(
        "installed",
        "installed: refuse a run whose code is not the heterotune-flwr installed here; any: do not ask",
        choices=("installed", "any"),
    )


@dataclass(frozen=True)
class ClientTable:
    """The client that a deployed node runs, and what of it may leave."""

    client_id: str = option(REQUIRED, "name of the client, the same for ever")
    backbone: str = option(
        REQUIRED, "an embedded (tiny-a/b/c) or fetched name, a directory, a .gguf file, or a hub id"
    )
    bits: str = option(
        "bf16", "of its weights; auto: the widest that fit memory-gb", choices=(*BITS, AUTO)
    )
    revision: str = option(None, "hub revision, for hub ids")
    memory_gb: float = option(
        None, "for weights and a training step; not given: what is free on the GPU [GB]", above=0
    )
    device: str = option(None, "cpu, cuda or cuda:N; not given: the GPU if there is one")
    threads: int = option(
        None, "of torch; not given: run.worker_threads [threads]", above=0, most=1024
    )
    data: str = option(
        REQUIRED, "file (or saved dataset) with its examples, which never leave; a guest needs none"
    )
    format: str = option(None, "of data and test; not given: by the names' ends", choices=FORMS)
    text_field: str = option("text", "column with the text, or with chat messages")
    label_field: str = option("label", "column with the answer")
    references_field: str = option("references", "column with a list of further right answers")
    test: str = option(None, "file of a test that this node is measured on")
    anchors: str = option(
        None, "file of the public texts that models are aligned on, if not a shipped set"
    )
    state_dir: str = option(REQUIRED, "folder of the client's private weights and logs; keep it")
    cache: str = option(None, "folder of backbones; not given: ~/.cache/heterotune")
    slots: str = option(None, "depth slots it trains (train.slots); not given: what the run says")
    report: str = option(
        "all",
        "what is told beside the update; counts-and-loss-only: examples, steps, learning rate and loss",
        choices=("all", "counts-and-loss-only"),
    )
    answers: str = option(
        "no",
        "yes: answers that its model writes on public prompts may leave, where a run asks",
        choices=_NO_YES,
    )
    class_sums: str = option(
        "no",
        "yes: counts of its classes, and sums that identify texts, may leave, where a run asks",
        choices=_NO_YES,
    )
    losses: str = option(
        None,
        "further losses of installed packages (train.losses) that a run may use here, names with commas; not given: "
        "none",
    )
    details: str = option(
        "no",
        "what a run's report may show of the last test. counts: how often each label occurs, and is mistaken for "
        "which; texts: also three of the examples, with what the models answer",
        choices=("no", COUNTS, TEXTS),
    )
    guest: str = option(
        "no",
        "yes: it has no labelled examples, or keeps them for its own test, and learns after the last round",
        choices=_NO_YES,
    )
    worker: str = option(
        "on", "on: a warm process keeps the backbone loaded between messages", choices=("on", "off")
    )
    worker_idle_minutes: float = option(
        30, "after so long without a message the warm process ends [minutes]", above=0
    )


def keys_of(table: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a table by their keys: ``client-id``."""
    return {field.name.replace("_", "-"): field for field in dataclasses.fields(table)}


SERVER, CLIENT = keys_of(ServerTable), keys_of(ClientTable)
