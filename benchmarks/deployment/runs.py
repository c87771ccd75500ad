"""A small run of deployed nodes that can be repeated in one process: same files, same secrets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.deployment.lab import Lab
from client_app.app import app
from heterotune_flwr.client.node_book import FILE, NodeBook
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.schema import Config

#: Simulated client -> its backbone; nodes have the same names.
NODES = {"client-0000": "tiny-a", "client-0001": "tiny-b", "client-0002": "tiny-a"}
#: Client -> its backbone and bits.
Brought = Mapping[str, tuple[str, str]]
TINY: Brought = {name: (backbone, "bf16") for name, backbone in NODES.items()}
_TYPES = "[{backbone: tiny-a, bits: bf16, clients: 2}, {backbone: tiny-b, bits: bf16, clients: 1}]"
_RUN = """yaml:
groups: {types: tiny, data: debian_sections, method: dema, alignment: labels, train: small_data, exchange: fp32,
  server: deployment}
strategies: [heterotune]
types: TYPES
data: {examples_per_client: 32, personal_test_examples: 8}
method: {latent: 32, inner: 8}
alignment: {count: 200, components: 64}
train: {local_steps: 3}
server: {rounds: ROUNDS, evaluate_every: 0, min_clients: 3, wait_seconds: 600, timeout_seconds: 600}
run: {name: deployed, dir: DIRECTORY}
"""


def configuration(directory: Path, rounds: int = 2, types: str = _TYPES) -> str:
    """Inline YAML of the run, written to ``directory``; ``types`` as the configuration has them."""
    text = _RUN.replace("ROUNDS", str(rounds)).replace("TYPES", types)
    return text.replace("DIRECTORY", str(directory))


def shard_file(path: Path, config: Config, partition: int) -> Path:
    """Write a node's file: all examples of the simulated client with its number."""
    shard = client_examples(config.data, partition, len(NODES), config.run.seeds[0])
    rows = [*shard.train, *shard.personal_test]
    lines = [json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path


def give_book(books: Path, name: str, state_dir: Path) -> None:
    """Give a node the book (:mod:`heterotune_flwr.client.node_book`) of its name: with another secret it would
    hold out other rows and draw other batches, and no two runs of it could be compared.
    """
    NodeBook(books / name)
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy(books / name / FILE, state_dir / FILE)


def simulated_bank(
    directory: Path,
    rounds: int = 2,
    types: str = _TYPES,
    brought: Brought = TINY,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Config, dict[str, Any]]:
    """The run with the same nodes in this process: its configuration and final bank.

    Their books are those in ``books`` beside ``directory`` (see :func:`join`); ``settings``: more of single nodes.
    """
    text = configuration(directory, rounds, types)
    config = compose(text, "server.wait_seconds=1")
    nodes = []
    for number, (name, (backbone, bits)) in enumerate(brought.items()):
        place = directory / "nodes" / name
        give_book(directory.parent / "books", name, place / "state")
        data = shard_file(place / "data.jsonl", config, number)
        nodes.append(
            {"client-id": name, "backbone": backbone, "bits": bits, "threads": 1, "worker": "off",
             "data": str(data), "state-dir": str(place / "state"), **(settings or {}).get(name, {})}
        )  # fmt: skip
    grid = InProcessGrid(app, nodes, {"config": text, "overrides": ""})
    run_strategies(grid, config, Journal(directory), "simulated-0")
    return config, final_bank(directory)


def final_bank(directory: Path) -> dict[str, Any]:
    """The final shared tensors of a run with one strategy and seed."""
    (path,) = (directory / "banks").glob("*.safetensors")
    return load_tensors(path)


def greatest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest absolute difference between two banks of the same tensors."""
    if set(one) != set(other):
        return float("inf")
    return max(float(np.max(np.abs(one[name] - other[name]))) for name in one)


def join(
    lab: Lab,
    config: Config,
    brought: Brought = TINY,
    before: Callable[[str], Sequence[str]] = lambda name: (),
    books: Path | None = None,
) -> None:
    """Give every node its settings and data, let it in, start it, and wait until all are online.

    ``before`` gives what is put before a node's command, to run it elsewhere; ``books`` is the folder of the nodes'
    books, where their run is compared with one in this process.
    """
    for number, (name, (backbone, bits)) in enumerate(brought.items()):
        place = lab.configure(name, client_id=name, backbone=backbone, bits=bits, threads=1)
        shard_file(place / "data.jsonl", config, number)
        if books is not None:
            give_book(books, name, place / "state")
    lab.register()
    for name in brought:
        lab.start_node(name, before=before(name))
    lab.await_online(set(brought))
