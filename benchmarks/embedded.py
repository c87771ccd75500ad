"""The headline on the embedded family, through real Flower simulations.

Accuracy of local-only, within-type averaging, FedIT (LoRA mean inside a type) and HeteroTune with
1, 2 and 4 clients per type, over several seeds and paired over clients; two controls; bytes on the wire;
seconds per client-round against the same optimizer steps in a bare PyTorch loop.

Run: ``python -m benchmarks.embedded [--seeds 0 1 2]`` (about 25 minutes on 2 cores).
Writes ``benchmarks/results/embedded.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.bare_loop import bare_seconds_per_client_round
from benchmarks.common import (
    client_accuracies,
    flower_run,
    mean_and_std,
    paired_gain,
    seed_means,
    write_results,
)

SHARED = ("local_only", "within_type", "heterotune")
WORKERS = 2


def overrides(clients: int, seeds: list[int], strategies: tuple[str, ...]) -> list[str]:
    """Overrides of the demo preset for ``clients`` clients of each of its three types."""
    return [
        *(f"types.{index}.clients={clients}" for index in range(3)),
        f"run.seeds={seeds}".replace(" ", ""),
        f"run.compare=[{','.join(strategies)}]",
        "server.evaluate_every=0",
    ]


def add_accuracy(table: dict[str, Any], results: dict[str, Any]) -> None:
    """Add mean and spread over seeds of every strategy of a run to a table."""
    for strategy in dict.fromkeys(run["strategy"] for run in results["runs"]):
        means = seed_means(client_accuracies(results, strategy))
        table[strategy], table[f"{strategy}.std"] = mean_and_std(means)
        personal = seed_means(client_accuracies(results, strategy, "personal_accuracy"))
        table[f"{strategy}.personal"] = mean_and_std(personal)[0]


def add_gains(table: dict[str, Any], ours: dict[str, Any], rivals: dict[str, Any]) -> None:
    """HeteroTune's gain over every other strategy, paired over clients and seeds."""
    mine = client_accuracies(ours, "heterotune")
    for rival in dict.fromkeys(run["strategy"] for run in rivals["runs"]):
        if rival != "heterotune":
            table[f"gain_over_{rival}"] = paired_gain(mine, client_accuracies(rivals, rival))


def round_seconds(results: dict[str, Any], strategy: str) -> float:
    """Median seconds of a training round in steady state (from the third on), no evaluation inside."""
    times: dict[int, list[float]] = {}
    for line in (Path(results["run_dir"]) / "rounds.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round" and event["strategy"] == strategy:
            times.setdefault(event["seed"], []).append(event["time"])
    gaps = [b - a for stamps in times.values() for a, b in itertools.pairwise(stamps[2:])]
    return statistics.median(gaps)


def add_bytes(values: dict[str, Any], results: dict[str, Any]) -> None:
    """The byte ledger of HeteroTune's first run."""
    counts = next(run["bytes"] for run in results["runs"] if run["strategy"] == "heterotune")
    values["wire_bytes_up"] = round(counts["up_per_client_round"])
    values["wire_bytes_down"] = round(counts["down_per_client_round"])
    values["one_time_bytes_up"] = counts["one_time_up"]
    values["one_time_bytes_down"] = counts["one_time_down"]
    values["lora16_bytes"] = round(counts["lora16_bytes"])
    values["model_bytes"] = round(counts["model_bytes"])


def add_overhead(values: dict[str, Any], results: dict[str, Any], clients: int) -> None:
    """Seconds per client-round through Flower over those of the bare loop."""
    flower = round_seconds(results, "heterotune") * WORKERS / clients
    kept = bare_seconds_per_client_round("demo", cached=True)
    full = bare_seconds_per_client_round("demo", cached=False)
    values["client_round_seconds"] = {
        "flower": round(flower, 4), "bare_loop_kept_states": round(kept, 4),
        "bare_loop_full_forward": round(full, 4),
    }  # fmt: skip
    values["sim_overhead_ratio"] = round(flower / kept, 2)
    values["sim_overhead_ratio_full_forward"] = round(flower / full, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4], help="per type")
    parser.add_argument("--no-fedit", action="store_true", help="leave out the slowest rival")
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds, "accuracy": {}}
    shared: dict[int, dict[str, Any]] = {}
    for clients in args.clients:
        table = values["accuracy"].setdefault(str(clients), {})
        cold = ["alignment.cache=false"] if clients == args.clients[-1] else []
        results = flower_run("demo", [*overrides(clients, args.seeds, SHARED), *cold])
        shared[clients] = results
        add_accuracy(table, results)
        add_gains(table, results, results)
        add_bytes(values, results)
        write_results("embedded", values)
    add_overhead(values, results, 3 * clients)
    for control in ("random_maps", "rotated_basis"):
        tables: dict[str, Any] = {}
        for clients in (1, 2):
            broken = flower_run("demo", [*overrides(clients, args.seeds, ("within_type", "heterotune")),
                                         f"alignment.control={control}"])  # fmt: skip
            add_accuracy(tables.setdefault(str(clients), {}), broken)
            add_gains(tables[str(clients)], broken, broken)
        values[f"control_{control}"] = tables
        write_results("embedded", values)
    for clients in [] if args.no_fedit else args.clients:
        results = flower_run("demo", overrides(clients, args.seeds, ("fedit",)))
        table = values["accuracy"][str(clients)]
        add_accuracy(table, results)
        add_gains(table, shared[clients], results)
        write_results("embedded", values)


if __name__ == "__main__":
    main()
