"""Two real pre-trained families together through Flower: SmolLM2-135M at 4 bits, Gemma-3-270M at 8 bits.

Accuracy of local-only, within-type averaging, HeteroTune and its bank alone with 1 and 2 clients per type, each at its
own best learning rate (found in the laboratory on other seeds), losses before and after per client, wall time, peak
memory, bytes, and the controls; FedIT with ``--tables fedit`` (hours on a CPU). HeteroTune is without its shared
discriminant here (``benchmarks.headline`` has both: ``real2`` and ``real2x2``).

Run: ``heterotune fetch smollm2; heterotune fetch gemma3-270m --accept-gemma-terms``, then
``python -m benchmarks.real_backbones`` (about 20 minutes on 2 cores the first time, half of it afterwards).
Writes ``benchmarks/results/real_backbones.json``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.common import flower_run, tuned_rates, write_results
from benchmarks.embedded import add_accuracy, add_bytes, control_tables, overrides, remember

TABLES = ("accuracy", "controls", "fedit")
FEDIT_RATE = 1e-3
#: Not those of the laboratory. More than for the embedded family: a run takes seconds.
SEEDS = [20, 21, 22, 23, 24, 25]


def per_client(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss and accuracy before and after, per client, of HeteroTune's first seed."""
    run = next(run for run in results["runs"] if run["strategy"] == "heterotune")
    before = {row["client_id"]: row for row in run["clients_before"]}
    return [
        {
            "client": row["client_id"],
            "type": row["type"],
            **{
                f"{key}_before": before[row["client_id"]][key]
                for key in ("global_loss", "global_accuracy")
            },
            **{f"{key}_after": row[key] for key in ("global_loss", "global_accuracy")},
        }
        for row in run["clients"]
    ]


def add_run(values: dict[str, Any], results: dict[str, Any]) -> None:
    """Wall time, peak memory, alignment and every client's losses of HeteroTune's first seed."""
    run = next(run for run in results["runs"] if run["strategy"] == "heterotune")
    values["alignment_quality"] = run["alignment"]["quality"]
    values["peak_memory_mb_per_worker"] = run["peak_memory_mb"]
    values["heterotune_seconds"] = round(run["seconds"], 1)
    values["clients"] = per_client(results)


def accuracy_table(values: dict[str, Any], seeds: list[int], clients: int) -> None:
    """Local-only, within-type and HeteroTune, and what one run of it costs and does."""
    rates = tuned_rates("real", 2, clients)
    started = time.monotonic()
    results = flower_run("real", overrides(clients, seeds, rates, types=2))
    values["wall_seconds"] = round(time.monotonic() - started, 1)
    table = values.setdefault("accuracy", {}).setdefault(str(clients), {})
    table["learning_rates"] = rates
    add_accuracy(table, results)
    remember("real_backbones", values, clients, results)
    add_bytes(values, results)
    add_run(values, results)
    write_results("real_backbones", values)


def fedit_table(values: dict[str, Any], seeds: list[int], clients: int) -> None:
    """FedIT, at a rate that was not tuned here."""
    results = flower_run("real", overrides(clients, seeds, {"fedit": FEDIT_RATE}, types=2))
    add_accuracy(values.setdefault("accuracy", {}).setdefault(str(clients), {}), results)
    remember("real_backbones", values, clients, results)
    write_results("real_backbones", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2], help="per type")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES[:2]),
                        help=f"fedit takes hours on a CPU (learning rate {FEDIT_RATE}, not tuned)")  # fmt: skip
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds}
    for clients in args.clients:
        if "accuracy" in args.tables:
            accuracy_table(values, args.seeds, clients)
    if "controls" in args.tables:
        control_tables("real_backbones", "real", "real", 2, values)
    for clients in args.clients if "fedit" in args.tables else ():
        fedit_table(values, args.seeds, clients)


if __name__ == "__main__":
    main()
