"""Hundreds and thousands of virtual clients: how long until they train, what a message costs, memory, aggregation.

* ``first_step_s``: seconds from ``heterotune run`` with 1,000 clients (the embedded family, three types, a Dirichlet
  partition of the shipped pool with a few texts each, 10 % of them a round) to the first client that trains, with maps
  and states of an earlier run kept; ``first_step_uncached_s`` the same with an empty cache.
* ``overhead_ms``: per client-round, ``(wall time of the rounds x workers - the clients' own training) / messages``, at
  100 and 1,000 clients, from kept states; ``overhead_ratio`` is their quotient.
* ``pss_mb``: largest proportional set size of all processes of the run together.
* ``agg_10k_s``: aggregating 10,000 updates of 33,000 numbers (five types, HeteroTune's default chain) once the last one
  is there, in the in-process grid; ``agg_10k_mb``: by how much the server's peak memory then exceeds that of a process
  which does the same with 100.

Run on two quiet cores: ``python -m benchmarks.speed.scale`` (about 10 minutes; to try it, ``--clients 30 60 --updates
500``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.runner import arguments, in_own_process, say, write_results
from heterotune_flwr.config.compose import compose
from heterotune_flwr.dema.bank import bank_shapes
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.flower import Context, Message, RecordDict
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.messages import (
    ALIGN,
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.queries import (
    AlignReply,
    DescribeReply,
    DescribeRequest,
)
from heterotune_flwr.schema import TypeConfig

SETTINGS = (
    "data.examples_per_client=16", "data.personal_test_examples=4", "server.participation=0.1",
    "run.compare=[heterotune]", "server.evaluate_every=0",
)  # fmt: skip
ROUNDS = 3
TYPES = 5
LABELS = [f"label-{index}" for index in range(6)]
POLL = 0.5


def _memory(root: int) -> float:
    """MB that a process and all that descend from it have, shared pages divided among their users."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(root)
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += member.memory_full_info().pss
    return total / 1e6


@contextmanager
def _watched(root: int, peak: dict[str, float]) -> Iterator[None]:
    """Take the largest memory of a process and its descendants while the block runs."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(POLL):
            peak["mb"] = max(peak.get("mb", 0.0), _memory(root))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def simulate(clients: int, cache: Path, rounds: int = ROUNDS) -> dict[str, float]:
    """One real simulation: seconds to the first trained client, overhead per client-round in ms, peak memory in MB."""
    folder = Path(tempfile.mkdtemp(prefix="heterotune-scale-"))
    each = [clients // 3 + (index < clients % 3) for index in range(3)]
    counts = [f"types.{index}.clients={count}" for index, count in enumerate(each)]
    command = [
        sys.executable, "-m", "heterotune_flwr.cli", "run", "demo", *SETTINGS, *counts,
        f"server.rounds={rounds}", "--dir", str(folder / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "HETEROTUNE_CACHE": str(cache)}
    peak: dict[str, float] = {}
    begun = time.time()
    process = subprocess.Popen(command, env=environment)
    with _watched(process.pid, peak):
        code = process.wait()
    if code:
        raise SystemExit(f"the simulation of {clients} clients ended with {code}")
    events = read_events(folder / "run" / "rounds.jsonl")
    found = _measured(events, begun)
    shutil.rmtree(folder)
    return {**found, "pss_mb": peak.get("mb", 0.0)}


def _measured(events: Sequence[dict[str, Any]], begun: float) -> dict[str, float]:
    replies = [event for event in events if event["event"] == "train_reply"]
    first = min(event["time"] - event["seconds"] for event in replies)
    rounds = [event for event in events if event["event"] == "round"]
    starts = {event["round"]: event["time"] for event in events if event["event"] == "checkpoint"}
    workers = len(os.sched_getaffinity(0))
    # The first round computes states and loads models; the others are the steady state.
    walls = {e["round"]: e["time"] - starts[e["round"] - 1] for e in rounds if e["round"] > 1}
    own = sum(event["seconds"] for event in replies if event["round"] in walls)
    count = sum(event["round"] in walls for event in replies)
    overhead = 1000 * (sum(walls.values()) * workers - own) / max(count, 1)
    return {"first_step_s": first - begun, "overhead_ms": overhead}


# --------------------------------------------------------------------------- ten thousand updates


class _Clients:
    """An app of synthetic clients that speak the wire contract: updates of the right size, no model."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        index = int(context.node_config["partition-id"])
        who = (f"client-{index:05d}", f"type-{index % TYPES}@bf16")
        answer = {
            DESCRIBE: self._describe, ALIGN: self._align, TRAIN: self._train, EVALUATE: self._evaluate,
        }[message.metadata.message_type]  # fmt: skip
        return Message(answer(message.content, index, *who), reply_to=message)

    def _describe(self, content: RecordDict, index: int, client: str, kind: str) -> RecordDict:
        method = DescribeRequest.from_content(content).header.method
        return DescribeReply(
            client, kind, kind, "bf16", 24, 4, 1000, 2000, 500, 16, 0, LABELS,
            bank_shapes(method, len(LABELS)), code_hash(),
        ).to_content()  # fmt: skip

    def _align(self, content: RecordDict, index: int, client: str, kind: str) -> RecordDict:
        rng = np.random.default_rng(index % TYPES)
        public = np.random.default_rng(99).normal(size=(300, 10))
        states = np.tanh(public @ rng.normal(size=(24, 10)).T * 0.4)
        mean = states.mean(axis=0)
        basis = np.linalg.svd(states - mean, full_matrices=False)[2][:16]
        parts = {"scores": (states - mean) @ basis.T, "basis": basis, "mean": mean}
        factors = {f"slots.0.{name}": part.astype(np.float32) for name, part in parts.items()}
        factors["label_rows"] = rng.normal(size=(len(LABELS), 24)).astype(np.float32)
        return AlignReply(client, kind, factors).to_content("fp32")

    def _train(self, content: RecordDict, index: int, client: str, kind: str) -> RecordDict:
        request = TrainRequest.from_content(content)
        rng = np.random.default_rng([request.header.round, index])
        shapes = bank_shapes(request.header.method, len(LABELS))
        train = request.header.train
        reach = np.float32(0.3 * train.learning_rate * train.local_steps)
        deltas = {
            name: reach * rng.standard_normal(shapes[name], dtype=np.float32)
            for name in request.expected
        }
        metrics = {
            "examples": 16.0, "steps": float(train.local_steps), "loss": 1.0, "seconds": 0.0,
            "learning_rate": train.learning_rate,
        }  # fmt: skip
        return TrainReply(
            client, kind, request.header.round, request.maps_digest, deltas, metrics,
            code_hash=code_hash(),
        ).to_content("bf16")  # fmt: skip

    def _evaluate(self, content: RecordDict, index: int, client: str, kind: str) -> RecordDict:
        request = EvaluateRequest.from_content(content)
        metrics = {"global_accuracy": 0.5, "global_loss": 1.0, "global_examples": 640.0}
        return EvaluateReply(
            client, kind, request.header.round, request.maps_digest, metrics
        ).to_content()


def aggregate(clients: int) -> dict[str, float]:
    """Rounds of synthetic clients in this process: numbers each sends, seconds after the last, peak memory in MB."""
    with tempfile.TemporaryDirectory(prefix="heterotune-scale-") as folder:
        config = compose("demo", f"run.dir={folder}/run run.compare=[heterotune]")
        config.types = [
            TypeConfig(f"type-{index}", "bf16", clients // TYPES) for index in range(TYPES)
        ]
        config.data.labels = LABELS
        config.method.latent, config.method.inner = 8, 730
        config.alignment.shrinkage, config.alignment.cache = [0.1], False
        config.server.rounds, config.server.evaluate_before = 2, False
        config.strategies = {"heterotune": {"_component_": "heterotune_flwr.strategies.HeteroTune"}}
        nodes = [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
        journal = Journal(Path(folder) / "run")
        run_strategies(
            InProcessGrid(_Clients(), nodes, most_in_flight=16), config, journal, "scale"
        )
        events = read_events(journal.path)
    seconds = []
    for number in (1, 2):
        last = max(
            e["time"] for e in events if e["event"] == "train_reply" and e["round"] == number
        )
        done = next(e for e in events if e["event"] == "round" and e["round"] == number)
        if done["clients"] != clients:
            raise SystemExit(f"only {done['clients']} of {clients} updates were used")
        seconds.append(done["time"] - last)
    shapes = bank_shapes(config.method, len(LABELS))
    return {
        "numbers": sum(int(np.prod(shape)) for shape in shapes.values()),
        "seconds": max(seconds),
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def measure(few: int, many: int, updates: int) -> dict[str, Any]:
    """Return everything, as it goes into the results."""
    small, large = (
        in_own_process("benchmarks.speed.scale", "--aggregate", str(count))
        for count in (100, updates)
    )
    with tempfile.TemporaryDirectory(prefix="heterotune-scale-cache-") as folder:
        cold = simulate(many, Path(folder), rounds=1)
        # Every client's states: the measured rounds draw the same clients, for the seed is the same.
        simulate(many, Path(folder))
        warm = simulate(many, Path(folder))
        simulate(few, Path(folder))
        less = simulate(few, Path(folder))
    return {
        "first_step_s": round(warm["first_step_s"], 1),
        "first_step_uncached_s": round(cold["first_step_s"], 1),
        "overhead_ms": {
            str(few): round(less["overhead_ms"], 1),
            str(many): round(warm["overhead_ms"], 1),
        },
        "overhead_ratio": round(warm["overhead_ms"] / less["overhead_ms"], 2),
        "pss_mb": {str(few): round(less["pss_mb"]), str(many): round(warm["pss_mb"])},
        "agg_10k_s": round(large["seconds"], 2),
        "agg_10k_mb": round(large["mb"] - small["mb"]),
        "agg_updates": updates,
        "agg_numbers": large["numbers"],
    }


def main() -> None:
    """Measure and print; the full sizes are written to the results."""
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs=2, default=[100, 1000])
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--aggregate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.aggregate:
        say(json.dumps(aggregate(options.aggregate)))
        return
    few, many = options.clients
    values = measure(few, many, options.updates)
    say(json.dumps(values, indent=2))
    if (options.clients, options.updates) == ([100, 1000], 10_000):
        write_results("scale", values)


if __name__ == "__main__":
    main()
