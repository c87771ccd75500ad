"""The headline on the embedded family, through real Flower simulations.

Accuracy of local-only, within-type averaging, FedIT (LoRA mean inside a type) and HeteroTune with
1, 2 and 4 clients per type, over several seeds and paired over clients; two controls; bytes on the wire;
seconds per client-round against the same optimizer steps in a bare PyTorch loop.

Run: ``python -m benchmarks.embedded [--seeds 0 1 2]`` (about 25 minutes on 2 cores).
Writes ``benchmarks/results/embedded.json``.
"""

from __future__ import annotations

import argparse
import statistics
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

STRATEGIES = ("local_only", "within_type", "fedit", "heterotune")


def overrides(clients: int, seeds: list[int], strategies: tuple[str, ...]) -> list[str]:
    """Overrides of the demo preset for ``clients`` clients of each of its three types."""
    return [
        *(f"types.{index}.clients={clients}" for index in range(3)),
        f"run.seeds={seeds}".replace(" ", ""),
        f"run.compare=[{','.join(strategies)}]",
        "server.evaluate_every=0",
    ]


def accuracy_table(results: dict[str, Any], strategies: tuple[str, ...]) -> dict[str, Any]:
    """Mean and spread over seeds per strategy, and HeteroTune's paired gains."""
    table: dict[str, Any] = {}
    for strategy in strategies:
        values = client_accuracies(results, strategy)
        table[strategy], table[f"{strategy}.std"] = mean_and_std(seed_means(values))
    ours = client_accuracies(results, "heterotune")
    for rival in strategies[:-1]:
        table[f"gain_over_{rival}"] = paired_gain(ours, client_accuracies(results, rival))
    return table


def seconds_per_client_round(results: dict[str, Any], strategy: str, workers: int) -> float:
    """Median over rounds and seeds of wall seconds x workers / clients (train phase only)."""
    values = [
        entry["train_seconds"] * min(workers, entry["clients"]) / entry["clients"]
        for run in results["runs"]
        if run["strategy"] == strategy
        for entry in run["rounds"][2:]
        if entry.get("train_seconds")
    ]
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="demo")
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds, "accuracy": {}}
    for clients in (1, 2, 4):
        results = flower_run(args.preset, overrides(clients, args.seeds, STRATEGIES))
        values["accuracy"][str(clients)] = accuracy_table(results, STRATEGIES)
        print(clients, "clients per type:", values["accuracy"][str(clients)], flush=True)
    run = next(run for run in results["runs"] if run["strategy"] == "heterotune")
    values["wire_bytes_up"] = run["bytes"]["up_per_client_round"]
    values["wire_bytes_down"] = run["bytes"]["down_per_client_round"]
    values["one_time_bytes_up"] = run["bytes"]["one_time_up"]
    values["one_time_bytes_down"] = run["bytes"]["one_time_down"]
    values["lora16_bytes"] = run["bytes"]["lora16_bytes"]
    values["model_bytes"] = run["bytes"]["model_bytes"]
    flower = seconds_per_client_round(results, "heterotune", workers=2)
    bare = bare_seconds_per_client_round(args.preset)
    values["client_round_seconds"] = {"flower": flower, "bare_loop": bare}
    values["sim_overhead_ratio"] = round(flower / bare, 3)
    for control, key in (("random_maps", "control_random_maps"),
                         ("rotated_basis", "control_rotated_basis")):  # fmt: skip
        table = {}
        for clients in (1, 2):
            broken = flower_run(
                args.preset,
                [*overrides(clients, args.seeds, ("within_type", "heterotune")),
                 f"alignment.control={control}"],
            )  # fmt: skip
            table[str(clients)] = accuracy_table(broken, ("within_type", "heterotune"))
        values[key] = table
        print(control, table, flush=True)
    write_results("embedded", values)


if __name__ == "__main__":
    main()
