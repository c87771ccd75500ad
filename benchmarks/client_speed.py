"""How fast a client trains: against a bare PyTorch loop, with and without kept states.

``prefix``: seconds per step of 16 texts of the demonstration task on SmolLM2-135M at 4 bits, for the last slot, the
upper half of four slots, and all four, with the states below kept (from the second epoch on) and without; and peak
memory of both. ``bare``: seconds per client-round in steady state through Flower over the same optimizer steps in a
bare PyTorch loop, both running the backbone in every step (``bare_loop_ratio``: SmolLM2) or both on kept states.
The warm worker and FlowerTune LLM are measured by ``benchmarks.warm_worker`` and ``benchmarks.flowertune``, into the
same file.

Run: ``heterotune fetch smollm2; python -m benchmarks.client_speed`` (about 10 minutes on 2 cores).
Writes ``benchmarks/results/client_speed.json``.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.bare_loop import bare_seconds_per_client_round
from benchmarks.common import flower_run, write_results
from benchmarks.embedded import round_seconds
from benchmarks.memory import measure_step

PARTS = ("prefix", "bare")
SLOTS = {"last_slot": "last-1", "upper_half": "upper-half", "all_slots": "all"}
#: Each with one worker, against one process: what shares a machine's cores or memory would blur the ratio.
RUNS = {
    "smollm2": ("real", ["types=[{backbone: smollm2, bits: nf4, clients: 2}]", "server.rounds=5",
                         "train.local_steps=4", "data.global_test_examples=32"]),
    "embedded": ("demo", ["types.0.clients=1", "types.1.clients=1", "types.2.clients=1", "server.rounds=12"]),
}  # fmt: skip
COMMON = ["run.compare=[bank]", "server.evaluate_every=0", "run.workers=1"]


def prefix(values: dict[str, Any], repeats: int) -> None:
    """Seconds per step and peak memory with and without kept states."""
    table = values.setdefault("prefix_cache", {})
    for name, slots in SLOTS.items():
        for kept in (False, True):
            steps = "12" if kept else "3"
            found = measure_step(
                ["--kind", "heterotune", "--loss", "labels", "--batch", "16", "--slots", slots,
                 "--steps", steps, "--repeats", str(repeats), *(["--kept"] if kept else [])]
            )  # fmt: skip
            table[f"{name}.{'kept' if kept else 'full'}"] = found
            print(name, "kept" if kept else "full", found, flush=True)
        speedup = table[f"{name}.full"]["seconds"] / table[f"{name}.kept"]["seconds"]
        values[f"prefix_cache_speedup_{name}"] = round(speedup, 2)


def bare(values: dict[str, Any], repeats: int) -> None:
    """Client-rounds through Flower over a bare loop: with the backbone in every step, and on kept states."""
    for name, (preset, words) in RUNS.items():
        overrides = [*words, *COMMON]
        for route, cached in (("full", False), ("kept", True)):
            asked = [*overrides, f"train.cache_states={str(cached).lower()}"]
            ratios, seconds = [], []
            for _ in range(repeats):
                results = flower_run(preset, asked)
                clients = len(results["runs"][0]["clients"])
                flower = round_seconds(results, "bank") / clients
                alone = bare_seconds_per_client_round(preset, cached, 1, overrides)
                ratios.append(flower / alone)
                seconds.append((flower, alone))
            values[f"bare_loop_ratio.{name}.{route}"] = round(statistics.median(ratios), 3)
            values[f"bare_loop_seconds.{name}.{route}"] = [
                {"flower": round(a, 4), "bare": round(b, 4)} for a, b in seconds
            ]
            print(name, route, ratios, flush=True)
    values["bare_loop_ratio"] = values["bare_loop_ratio.smollm2.full"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    values: dict[str, Any] = {"runs": args.repeats}
    if "prefix" in args.parts:
        prefix(values, args.repeats)
        write_results("client_speed", values)
    if "bare" in args.parts:
        bare(values, args.repeats)
        write_results("client_speed", values)


if __name__ == "__main__":
    main()
