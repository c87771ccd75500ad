"""Two real pre-trained families together through Flower: SmolLM2-135M at 4 bits, Gemma-3-270M at 8 bits.

Accuracy of local-only, within-type averaging and HeteroTune with 1 and 2 clients per type (and FedIT with
``--fedit``: hours on a CPU), losses before and after per client, wall time, peak memory, bytes, and the controls.

Run: ``heterotune fetch smollm2; heterotune fetch gemma3-270m --accept-gemma-terms``, then
``python -m benchmarks.real_backbones`` (about 20 minutes on 2 cores the first time, half of it afterwards).
Writes ``benchmarks/results/real_backbones.json``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.common import flower_run, write_results
from benchmarks.embedded import SHARED, add_accuracy, add_bytes, add_gains


def overrides(clients: int, seeds: list[int], strategies: tuple[str, ...]) -> list[str]:
    """Overrides of the ``real`` preset for ``clients`` clients of each of its two types."""
    return [
        *(f"types.{index}.clients={clients}" for index in range(2)),
        f"run.seeds={seeds}".replace(" ", ""),
        f"run.compare=[{','.join(strategies)}]",
        "server.evaluate_every=0",
    ]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2], help="per type")
    parser.add_argument("--fedit", action="store_true", help="also LoRA inside each type (slow)")
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds, "accuracy": {}}
    for clients in args.clients:
        table = values["accuracy"].setdefault(str(clients), {})
        strategies = (*SHARED[:2], "fedit", SHARED[2]) if args.fedit else SHARED
        started = time.monotonic()
        results = flower_run("real", overrides(clients, args.seeds, strategies))
        values["wall_seconds"] = round(time.monotonic() - started, 1)
        add_accuracy(table, results)
        add_gains(table, results, results)
        add_bytes(values, results)
        run = next(run for run in results["runs"] if run["strategy"] == "heterotune")
        values["alignment_quality"] = run["alignment"]["quality"]
        values["peak_memory_mb_per_worker"] = run["peak_memory_mb"]
        values["heterotune_seconds"] = round(run["seconds"], 1)
        values["clients"] = per_client(results)
        write_results("real_backbones", values)
    for control in ("random_maps", "rotated_basis"):
        table = values.setdefault(f"control_{control}", {})
        broken = flower_run("real", [*overrides(2, args.seeds, ("within_type", "heterotune")),
                                     f"alignment.control={control}"])  # fmt: skip
        add_accuracy(table, broken)
        add_gains(table, broken, broken)
        write_results("real_backbones", values)


if __name__ == "__main__":
    main()
