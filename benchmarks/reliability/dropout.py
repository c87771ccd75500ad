"""A hundred clients of three model types, a part of them silently lost in every round.

Toy clients on the real wire contract; "lost" means that a training message gets no answer at all.

Run: ``python -m benchmarks.reliability.dropout`` (minutes).
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import SEEDS, arguments, say, use_test_helpers, write_results
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.sampling import named_generator

use_test_helpers()
ROUNDS = 30
SPEC = {"_component_": "heterotune_flwr.strategies.HeteroTune"}


def one_run(clients: int, seed: int, lost: float, rounds: range, **server: Any) -> dict[str, Any]:
    """Run once; ``lost`` of the clients do not answer ``train`` in each of ``rounds``. Returns how it ended."""
    from toy_federation import ToyFederation, toy_config

    counts = (clients - 2 * (clients // 3), clients // 3, clients // 3)
    settings = {"rounds": ROUNDS, "timeout_seconds": 5.0, "deadline_floor_seconds": 0.1, **server}
    folder = Path(tempfile.mkdtemp(prefix="heterotune-dropout-"))
    config = toy_config(folder, counts, {"heterotune": SPEC}, **settings)
    config = replace(config, run=replace(config.run, seeds=[seed]))
    order: dict[int, int] = {}

    def drop(node: int, kind: str, round: int) -> bool:
        if kind != "train" or round not in rounds:
            return False
        chosen = named_generator(seed, "lost", round).permutation(clients)[: int(lost * clients)]
        return order[node] in chosen

    grid = ToyFederation(config).grid(drop=drop)
    order |= {node: index for index, node in enumerate(grid.get_node_ids())}
    journal = Journal(folder / "run")
    status, reason, results = "finished", None, None
    try:
        results = run_strategies(grid, config, journal, "toy-0")
    except FederationError as error:
        status, reason = "failed", str(error)
    events = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").open()]
    row: dict[str, Any] = {
        "seed": seed, "lost": lost, "status": status, "reason": reason,
        "rounds": sum(event["event"] == "round" for event in events),
        "skipped": sum(event["event"] == "skipped" for event in events),
        "cooldown": sum(event["event"] == "cooldown" for event in events),
        "lost_messages": sum(bool(event.get("straggler")) for event in events),
    }  # fmt: skip
    if results is not None:
        (outcome,) = results["runs"]
        row["final_loss"] = outcome["overall"]["global_loss_mean"]
        row["loss_before"] = outcome["before"]["overall"]["global_loss_mean"]
        bank = load_tensors(folder / "run" / "banks" / f"heterotune-seed{seed}.safetensors")
        row["finite"] = all(bool(np.isfinite(value).all()) for value in bank.values())
    say(json.dumps(row))
    return row


def gap(row: dict[str, Any], whole: dict[str, Any]) -> float:
    """Final loss against the lossless run's, in percent."""
    return 100 * float(row["final_loss"] - whole["final_loss"]) / float(whole["final_loss"])


def measure(clients: int, seeds: list[int]) -> dict[str, Any]:
    """Lossless against 30 % lost, seed by seed; then 90 % lost for two rounds, and for ever."""
    every = range(1, ROUNDS + 1)
    pairs = [(one_run(clients, s, 0.0, every), one_run(clients, s, 0.3, every)) for s in seeds]
    gaps = [gap(lossy, whole) for whole, lossy in pairs]
    needed = clients // 5
    storm = one_run(clients, seeds[0], 0.9, range(12, 14), min_results=needed)
    ever = one_run(clients, seeds[0], 0.9, every, min_results=needed)
    return {
        "clients": clients,
        "rounds": ROUNDS,
        "seeds": seeds,
        "loss_gap_percent_30": round(statistics.fmean(gaps), 3),
        "loss_gap_percent_30_worst": round(max(gaps, key=abs), 3),
        "loss_gap_percent_90_for_2_rounds": round(gap(storm, pairs[0][0]), 3),
        "skipped_90_for_2_rounds": storm["skipped"],
        "status_90_for_ever": ever["status"],
        "reason_90_for_ever": ever["reason"],
        "rows": [row for pair in pairs for row in pair] + [storm, ever],
    }


def main() -> None:
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--clients", type=int, default=100, help="another number is not written")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = measure(args.clients, args.seeds)
    say(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))
    if args.clients == parser.get_default("clients"):
        write_results("dropout", found, anew=True)


if __name__ == "__main__":
    main()
