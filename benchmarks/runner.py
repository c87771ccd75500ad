"""What all benchmarks share: arguments, real runs, cells that are kept, result files, statistics, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from heterotune_flwr.exchange.storage import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Of the tables. Settings were chosen on seeds 0 to 9; the laboratory's tables have 100 and up.
SEEDS = [20, 21, 22]
#: (seed, model type, client id)
Key = tuple[int, str, str]


# ------------------------------------------------------------------------------------ commands


def arguments(doc: str | None, seeds: Sequence[int] | None = None) -> argparse.ArgumentParser:
    """A command's parser, with ``--seeds`` where it has some."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if seeds is not None:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    return parser


def add_instructions(parser: argparse.ArgumentParser) -> None:
    """Let a command be told where the texts of Natural Instructions lie; None where it is not."""
    parser.add_argument(
        "--instructions",
        type=Path,
        default=os.environ.get("HETEROTUNE_INSTRUCTIONS"),
        help="the extract of Natural Instructions [$HETEROTUNE_INSTRUCTIONS]",
    )


def say(*words: object) -> None:
    """Print at once: some parts take minutes."""
    print(*words, flush=True)


def command() -> str:
    """The command that runs now."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else ""


def machine() -> str:
    """One line about where the numbers come from."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{os.cpu_count()} x {model}, Python {platform.python_version()}"


def use_test_helpers(*folders: str) -> None:
    """Make modules of ``tests`` importable, the toy federation's among them."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in (*folders, "")]


# ------------------------------------------------------------------------------------ runs


def flower_run(preset: str, overrides: Sequence[str], keep: Path | None = None) -> dict[str, Any]:
    """Runs ``heterotune run`` (a real Flower simulation) and returns its ``results.json``."""
    folder = keep or Path(tempfile.mkdtemp(prefix="heterotune-benchmark-"))
    words = [sys.executable, "-m", "heterotune_flwr.cli", "run", preset, *overrides]
    subprocess.run([*words, "--dir", str(folder)], check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    results["run_dir"] = str(folder)
    return results


def in_own_process(module: str, *words: str) -> dict[str, Any]:
    """What a module prints as its last line, a JSON object, when it runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------ result files


def results_file(name: str) -> Path:
    """Where the results of that name lie."""
    return RESULTS / f"{name}.json"


def load_results(name: str) -> dict[str, Any]:
    """All of ``benchmarks/results/<name>.json``; empty where it was never written."""
    path = results_file(name)
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return values


def read_results(name: str) -> dict[str, Any]:
    """The same without its commands and machine."""
    return {k: v for k, v in load_results(name).items() if k not in ("command", "machine")}


def write_results(name: str, values: Mapping[str, Any], anew: bool = False) -> None:
    """Merge rows into a result file, with the command and the machine; others' rows stay, unless ``anew``."""
    RESULTS.mkdir(exist_ok=True)
    path = results_file(name)
    with FileLock(path.with_suffix(".lock")):
        known = {} if anew else read_results(name)
        if known.get("seeds", values.get("seeds")) != values.get("seeds", known.get("seeds")):
            raise SystemExit(f"{path} holds other seeds ({known['seeds']}); remove it first")
        commands = "" if anew else str(load_results(name).get("command", ""))
        said = "; ".join(dict.fromkeys(filter(None, [*commands.split("; "), command()])))
        head = {"command": said, "machine": machine()}
        _write(path, {**head, **merged(known, dict(values))})


def merged(known: Any, new: Any) -> Any:
    """Two results, dictionaries joined at every depth; elsewhere the new one stands."""
    if isinstance(known, dict) and isinstance(new, dict):
        return {**known, **{key: merged(known.get(key), value) for key, value in new.items()}}
    return new


def _write(path: Path, values: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(values, indent=1) + "\n")


class Cells:
    """Measured cells by name, kept as they are done, so that a command goes on where it was stopped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self) -> dict[str, Any]:
        """All of them."""
        return load_results(self._name)

    def keep(self, new: Mapping[str, Any]) -> None:
        """Add some."""
        RESULTS.mkdir(exist_ok=True)
        _write(results_file(self._name), {**self.read(), **new})

    def forget(self, these: Callable[[str], bool]) -> None:
        """Drop some: those of a method that has changed."""
        left = {name: cell for name, cell in self.read().items() if not these(name)}
        _write(results_file(self._name), left)


# ------------------------------------------------------------------------------------ statistics


def by_client(
    results: Mapping[str, Any], strategy: str, metric: str = "global_accuracy", scale: float = 100.0
) -> dict[Key, float]:
    """(seed, type, client id) -> a client's last test of a strategy; accuracies in percent."""
    return {
        (run["seed"], client["type"], client["client_id"]): scale * client[metric]
        for run in results["runs"]
        if run["strategy"] == strategy
        for client in run["clients"]
    }


def seed_means(values: Mapping[Key, float]) -> list[float]:
    """Mean over clients, one value per seed."""
    seeds = sorted({key[0] for key in values})
    return [statistics.fmean(v for key, v in values.items() if key[0] == seed) for seed in seeds]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), rounded to 0.001."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 3), round(spread, 3)


def paired_gain(
    a: Mapping[Key, float], b: Mapping[Key, float], draws: int = 2000
) -> dict[str, float]:
    """Mean of a - b over the clients both have, with a 95 % bootstrap interval.

    What is drawn anew are the (seed, type) cells, not the clients: those of one cell share a bank.
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


# ------------------------------------------------------------------------------------ tables


def told_gain(gain: Mapping[str, float], digits: int = 1) -> str:
    """A paired gain as a table shows it, with its interval where it has one."""
    value, *ends = (f"{gain[k]:+.{digits}f}" for k in ("gain", "low", "high") if k in gain)
    return f"{value} ({' .. '.join(ends)})" if ends else value


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of at most six columns."""
    if len(head) > 6:
        raise ValueError(f"a table of {len(head)} columns is too wide to read: {head}")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells for {len(head)} columns: {row}")
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)
