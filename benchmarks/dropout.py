"""A hundred clients of three model types; a part of them silently lost in every round.

The clients are the real ClientApp on the embedded backbones, answering in this process; "lost" means that a training
message gets no answer at all. Writes ``benchmarks/results/dropout.json``::

    python -m benchmarks.dropout

"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from client_app.app import app
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.sampling import named_generator
from heterotune_flwr.federation.server import run
from heterotune_flwr.flower import Context, RecordDict

ROUNDS = 20
OVERRIDES = (
    "run.compare=[heterotune] data.examples_per_client=48 data.personal_test_examples=4 "
    "data.global_test_examples=320 alignment.count=2000 server.evaluate_every=0 "
    "server.timeout_seconds=600 server.deadline_floor_seconds=0.2 alignment.cache=true"
)


def one_run(clients: int, seed: int, lost: float, rounds: range, extra: str = "") -> dict[str, Any]:
    """Run once; ``lost`` of the clients do not answer ``train`` in each of ``rounds``. Returns how it ended."""
    counts = [clients - 2 * (clients // 3), clients // 3, clients // 3]
    folder = Path(tempfile.mkdtemp(prefix="heterotune-dropout-"))
    types = " ".join(f"types.{i}.clients={n} types.{i}.bits=bf16" for i, n in enumerate(counts))
    overrides = f"{OVERRIDES} {types} run.seeds=[{seed}] run.dir={folder}"
    config = {"config": "demo", "overrides": f"{overrides} server.rounds={ROUNDS} {extra}"}
    nodes = [{"partition-id": i, "num-partitions": clients} for i in range(clients)]
    grid = InProcessGrid(app, nodes, config)
    order = {node: index for index, node in enumerate(grid.get_node_ids())}

    def drop(node: int, kind: str, round: int) -> bool:
        if kind != "train" or round not in rounds:
            return False
        chosen = named_generator(seed, "lost", round).permutation(clients)[: int(lost * clients)]
        return order[node] in chosen

    grid._drop = drop
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    started = time.monotonic()
    try:
        results = run(grid, context)
    except FederationError:  # how it ended is in the run directory
        results = None
    status = json.loads((folder / "status.json").read_text())
    events = [json.loads(line) for line in (folder / "rounds.jsonl").open()]
    row = {
        "seed": seed, "lost": lost, "status": status["state"], "reason": status["reason"],
        "seconds": round(time.monotonic() - started, 1),
        "rounds": sum(event["event"] == "round" for event in events),
        "skipped": sum(event["event"] == "skipped" for event in events),
        "benched": sum(event["event"] == "benched" for event in events),
        "stragglers": sum(bool(event.get("straggler")) for event in events),
    }  # fmt: skip
    if results is not None:
        row["final_loss"] = results["runs"][0]["overall"]["global_loss_mean"]
        row["loss_before"] = results["runs"][0]["before"]["overall"]["global_loss_mean"]
    return row


def main(clients: int, seeds: list[int]) -> dict[str, Any]:
    """Lossless against 30 % lost, seed by seed; then 90 % lost for three rounds, and for ever."""
    every = range(1, ROUNDS + 1)
    rows, gaps = [], []
    for seed in seeds:
        whole = one_run(clients, seed, 0.0, every)
        lossy = one_run(clients, seed, 0.3, every)
        rows += [whole, lossy]
        gaps.append(100 * (lossy["final_loss"] - whole["final_loss"]) / whole["final_loss"])
        sys.stdout.write(f"{json.dumps(whole)}\n{json.dumps(lossy)}\n")
    enough = f"server.min_results={clients // 5}"
    storm = one_run(clients, seeds[0], 0.9, range(8, 10), enough)
    ever = one_run(clients, seeds[0], 0.9, every, enough)
    whole_loss = rows[0]["final_loss"]
    return {
        "command": "python -m benchmarks.dropout",
        "machine": machine(),
        "clients": clients,
        "rounds": ROUNDS,
        "seeds": seeds,
        "loss_gap_percent_30": round(statistics.fmean(gaps), 3),
        "loss_gap_percent_30_worst": round(max(gaps, key=abs), 3),
        "loss_gap_percent_90_for_2_rounds": round(
            100 * (storm["final_loss"] - whole_loss) / whole_loss, 3
        ),
        "skipped_90_for_2_rounds": storm["skipped"],
        "status_90_for_ever": ever["status"],
        "reason_90_for_ever": ever["reason"],
        "rows": [*rows, storm, ever],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    arguments = parser.parse_args()
    outcome = main(arguments.clients, arguments.seeds)
    path = Path(__file__).parent / "results" / "dropout.json"
    atomic_write_text(path, json.dumps(outcome, indent=2) + "\n")
    flat = {key: value for key, value in outcome.items() if key != "rows"}
    sys.stdout.write(json.dumps(flat, indent=2) + "\n")
