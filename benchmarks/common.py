"""What the Flower-run benchmarks share: start a real run, read its results, pair over clients."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from heterotune_flwr.exchange.storage import atomic_write_text

RESULTS = Path(__file__).parent / "results"
#: Not those of the laboratory (0 to 9 while the settings were sought, from 100 on for its tables).
SEEDS = [20, 21, 22]
#: (seed, model type, client id)
Key = tuple[int, str, str]


def flower_run(preset: str, overrides: Sequence[str], keep: Path | None = None) -> dict[str, Any]:
    """Runs ``heterotune run`` (a real Flower simulation) and returns its ``results.json``."""
    folder = keep or Path(tempfile.mkdtemp(prefix="heterotune-bench-"))
    command = [sys.executable, "-m", "heterotune_flwr.cli", "run", preset, *overrides]
    subprocess.run([*command, "--dir", str(folder)], check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    results["run_dir"] = str(folder)
    return results


def client_accuracies(
    results: dict[str, Any], strategy: str, metric: str = "global_accuracy"
) -> dict[Key, float]:
    """(seed, type, client id) -> final accuracy in percent."""
    return {
        (run["seed"], client["type"], client["client_id"]): 100 * client[metric]
        for run in results["runs"]
        if run["strategy"] == strategy
        for client in run["clients"]
    }


def seed_means(accuracies: Mapping[Key, float]) -> list[float]:
    """Mean over clients, one value per seed."""
    seeds = sorted({key[0] for key in accuracies})
    return [
        statistics.fmean(v for key, v in accuracies.items() if key[0] == seed) for seed in seeds
    ]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), rounded to 0.001."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 3), round(spread, 3)


def paired_gain(
    a: Mapping[Key, float], b: Mapping[Key, float], draws: int = 2000
) -> dict[str, float]:
    """Mean of a - b over the clients both have, with a 95 % bootstrap interval.

    Keys are (seed, type, client). What is drawn anew are the (seed, type) cells, not the clients: those of
    one cell share a bank, so they are not independent.
    """
    rng = random.Random(0)
    cells: dict[tuple[Any, ...], list[float]] = {}
    for key in sorted(a.keys() & b.keys()):
        cells.setdefault(key[:2], []).append(a[key] - b[key])
    differences = [value for cell in cells.values() for value in cell]
    drawn = (rng.choices(list(cells.values()), k=len(cells)) for _ in range(draws))
    means = sorted(statistics.fmean(v for cell in cells for v in cell) for cells in drawn)
    return {
        "gain": round(statistics.fmean(differences), 3),
        "low": round(means[int(0.025 * draws)], 3),
        "high": round(means[int(0.975 * draws)], 3),
        "clients_helped": round(sum(d > 0 for d in differences) / len(differences), 3),
    }


def read_results(name: str) -> dict[str, Any]:
    """What ``benchmarks/results/<name>.json`` holds so far, without its command and machine."""
    path = RESULTS / f"{name}.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in values.items() if key not in ("command", "machine")}


def tuned_rates(family: str, types: int, clients: int, row: str = "labels") -> dict[str, float]:
    """Each strategy's best learning rate in a row of the laboratory, whose seeds are not the benchmarks'.

    HeteroTune's is that of the row with a type phase, where it was measured, else that of its bank alone.
    """
    known = read_results("alignment_probe")[family]["federated"]
    where = f"{types} types, {clients} per type"

    def best(row: str, sharing: str) -> float:
        rates: dict[str, float] = known[f"{where}, {row}"]["by_rate"][sharing]
        return float(max(rates, key=lambda rate: rates[rate]))

    phase = f"{row}, type phase"
    strategies = {"local_only": "alone", "within_type": "within", "bank": "across"}
    found = {strategy: best(row, sharing) for strategy, sharing in strategies.items()}
    measured = f"{where}, {phase}" in known
    return {**found, "heterotune": best(phase, "across") if measured else found["bank"]}


def machine() -> str:
    """One line about where the numbers come from."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        model = names[0] if names else model
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}"


def write_results(name: str, values: dict[str, Any]) -> None:
    """Merge rows into ``benchmarks/results/<name>.json``, with the command and the machine; others' rows stay."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python -m benchmarks.{name}"
    path = RESULTS / f"{name}.json"
    with FileLock(path.with_suffix(".lock")):
        known = read_results(name)
        if known.get("seeds", values.get("seeds")) != values.get("seeds"):
            raise SystemExit(f"{path} holds other seeds ({known['seeds']}); remove it first")
        merged = {"command": command, "machine": machine(), **_merged(known, values)}
        atomic_write_text(path, json.dumps(merged, indent=2) + "\n")


def _merged(known: Any, new: Any) -> Any:
    if isinstance(known, dict) and isinstance(new, dict):
        return {**known, **{key: _merged(known.get(key), value) for key, value in new.items()}}
    return new
