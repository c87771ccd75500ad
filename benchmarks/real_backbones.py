"""Two real pre-trained families together through Flower: SmolLM2-135M at 4 bits, Gemma-3-270M at 8 bits.

Accuracy of local-only, within-type averaging and HeteroTune with 1 and 2 clients per type, each at its own best
learning rate (found in the laboratory on other seeds), losses before and after per client, wall time, peak memory,
bytes, and the controls; FedIT with ``--tables fedit`` (hours on a CPU).

Run: ``heterotune fetch smollm2; heterotune fetch gemma3-270m --accept-gemma-terms``, then
``python -m benchmarks.real_backbones`` (about 20 minutes on 2 cores the first time, half of it afterwards).
Writes ``benchmarks/results/real_backbones.json``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.common import SEEDS, flower_run, tuned_rates, write_results
from benchmarks.embedded import CONTROLS, add_accuracy, add_bytes, control_row, overrides, remember

TABLES = ("accuracy", "controls", "fedit")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2], help="per type")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES[:2]),
                        help="fedit takes hours on a CPU, at 1e-3")  # fmt: skip
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds}
    for clients in args.clients:
        rates = tuned_rates("real", 2, clients)
        table = values.setdefault("accuracy", {}).setdefault(str(clients), {})
        if "accuracy" in args.tables:
            table["learning_rates"] = {**table.get("learning_rates", {}), **rates}
            started = time.monotonic()
            results = flower_run("real", overrides(clients, args.seeds, rates, types=2))
            values["wall_seconds"] = round(time.monotonic() - started, 1)
            add_accuracy(table, results)
            remember("real_backbones", values, clients, results)
            add_bytes(values, results)
            add_run(values, results)
            write_results("real_backbones", values)
        if "fedit" in args.tables:
            fedit = flower_run("real", overrides(clients, args.seeds, {"fedit": 1e-3}, types=2))
            add_accuracy(table, fedit)
            remember("real_backbones", values, clients, fedit)
            write_results("real_backbones", values)
        for control in CONTROLS if "controls" in args.tables else ():
            rates = tuned_rates("real", 2, clients, f"control {control}")
            pair = {name: rates[name] for name in ("within_type", "heterotune")}
            broken = flower_run("real", [*overrides(clients, args.seeds, pair, types=2),
                                         f"alignment.control={control}"])  # fmt: skip
            values.setdefault(f"control_{control}", {})[str(clients)] = control_row(broken)
            write_results("real_backbones", values)


if __name__ == "__main__":
    main()
