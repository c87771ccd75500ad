"""What the Flower-run benchmarks share: start a real run, read its results, pair over clients."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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
) -> dict[tuple[int, str], float]:
    """(seed, client id) -> final accuracy in percent."""
    return {
        (run["seed"], client["client_id"]): 100 * client[metric]
        for run in results["runs"]
        if run["strategy"] == strategy
        for client in run["clients"]
    }


def seed_means(accuracies: dict[tuple[int, str], float]) -> list[float]:
    """Mean over clients, one value per seed."""
    seeds = sorted({seed for seed, _ in accuracies})
    return [statistics.fmean(v for (s, _), v in accuracies.items() if s == seed) for seed in seeds]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), rounded to 0.01."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 2), round(spread, 2)


def paired_gain(
    a: Mapping[Any, float], b: Mapping[Any, float], draws: int = 2000
) -> dict[str, float]:
    """Mean of a - b over the clients both have, with a 95 % bootstrap interval over clients."""
    import random

    rng = random.Random(0)
    differences = [a[key] - b[key] for key in sorted(a) if key in b]
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(draws)
    )
    return {
        "gain": round(statistics.fmean(differences), 2),
        "low": round(means[int(0.025 * draws)], 2),
        "high": round(means[int(0.975 * draws)], 2),
        "clients_helped": round(sum(d > 0 for d in differences) / len(differences), 3),
    }


def read_results(name: str) -> dict[str, Any]:
    """What ``benchmarks/results/<name>.json`` holds so far, without its command and machine."""
    path = RESULTS / f"{name}.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {
        key: value
        for key, value in values.items()
        if key not in ("command", "last_part", "machine")
    }


def tuned_rates(family: str, types: int, clients: int) -> dict[str, float]:
    """Each strategy's best learning rate in the laboratory, whose seeds are not the benchmarks'."""
    known = read_results("alignment_probe")[family]["federated"]
    rates = known[f"{types} types, {clients} per type, labels"]["by_rate"]
    strategies = {"local_only": "alone", "within_type": "within", "heterotune": "across"}
    return {
        strategy: float(max(rates[sharing], key=lambda rate: rates[sharing][rate]))
        for strategy, sharing in strategies.items()
    }


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
    """Writes ``benchmarks/results/<name>.json`` with the command, its last part run, and the machine."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python -m benchmarks.{name}"
    last = f"{command} {' '.join(sys.argv[1:])}".strip()
    values = {"command": command, "last_part": last, "machine": machine(), **values}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n")
    print(f"wrote {path}")
