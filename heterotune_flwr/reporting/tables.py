"""The tables of a finished run, from ``results.json`` alone."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heterotune_flwr.errors import FederationError

TITLES = {
    "local_only": "local only",
    "within_type": "within type",
    "fedit": "FedIT (LoRA)",
    "heterotune": "HeteroTune",
    "mean": "plain mean",
}
OVERALL = "all clients"


def load_results(directory: Path) -> dict[str, Any]:
    """``results.json`` of a run directory.

    Raises
    ------
    FederationError
        There are none (yet).

    """
    path = directory / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FederationError(f"{directory} has no readable results.json ({error})") from error
    return results


def _title(strategy: str) -> str:
    return TITLES.get(strategy, strategy)


def _accuracies(
    results: Mapping[str, Any], strategy: str, type_key: str, metric: str
) -> list[list[float]]:
    """Per seed, the clients' accuracies in percent."""
    return [
        [
            100 * client[metric]
            for client in run["clients"]
            if client[metric] is not None and type_key in (OVERALL, client["type"])
        ]
        for run in results["runs"]
        if run["strategy"] == strategy
    ]


def mean_accuracy(
    results: Mapping[str, Any], strategy: str, type_key: str = OVERALL, metric: str = "global_accuracy"
) -> tuple[float, float] | None:
    """(mean over clients and seeds, standard deviation over seeds) in percent; None without data."""
    means = [statistics.fmean(row) for row in _accuracies(results, strategy, type_key, metric) if row]
    if not means:
        return None
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def _strategies(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["strategy"] for run in results["runs"]))


def _types(results: Mapping[str, Any]) -> list[str]:
    return sorted({client["type"] for run in results["runs"] for client in run["clients"]})


def _cell(value: tuple[float, float] | None, seeds: int) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.1f} ± {value[1]:.1f}" if seeds > 1 else f"{value[0]:.1f}"


def _gain(value: tuple[float, float] | None, base: tuple[float, float] | None) -> str:
    return "-" if value is None or base is None else f"{value[0] - base[0]:+.1f}"


def accuracy_table(results: Mapping[str, Any], metric: str = "global_accuracy") -> Table:
    """Accuracy in percent, one row per type, one column per strategy; gains of the last strategy."""
    strategies = _strategies(results)
    seeds = len({run["seed"] for run in results["runs"]})
    which = "the global test" if metric == "global_accuracy" else "the clients' own tests"
    spread = f", ± over {seeds} seeds" if seeds > 1 else ", 1 seed"
    table = Table(title=f"Accuracy (%) on {which}: mean over clients{spread}")
    table.add_column("model type")
    for strategy in strategies:
        table.add_column(_title(strategy), justify="right")
    rivals = strategies[:-1]
    for rival in rivals:
        table.add_column(f"gain over {_title(rival)}", justify="right")
    for type_key in [*_types(results), OVERALL]:
        values = {s: mean_accuracy(results, s, type_key, metric) for s in strategies}
        gains = [_gain(values[strategies[-1]], values[rival]) for rival in rivals]
        style = "bold" if type_key == OVERALL else None
        cells = [_cell(values[s], seeds) for s in strategies]
        table.add_row(type_key, *cells, *gains, style=style, end_section=False)
    return table


def human_bytes(count: float) -> str:
    """``28416 -> "28.4 kB"`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _saved(part: float, whole: float) -> str:
    return "-" if not whole else f"{100 * (1 - part / whole):.2f} %"


def bytes_table(results: Mapping[str, Any]) -> Table:
    """Bytes per client-round, each way, against LoRA r=16 and the whole model; one-time bytes apart."""
    table = Table(title="Bytes on the wire per client and round")
    for name in ("strategy", "up", "down", "fewer than LoRA r=16", "fewer than the model", "once per run"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for strategy in _strategies(results):
        counts = next(run["bytes"] for run in results["runs"] if run["strategy"] == strategy)
        up = counts["up_per_client_round"]
        once = counts["one_time_up"] + counts["one_time_down"]
        table.add_row(
            _title(strategy),
            human_bytes(up),
            human_bytes(counts["down_per_client_round"]),
            _saved(up, counts["lora16_bytes"]),
            _saved(up, counts["model_bytes"]),
            human_bytes(once),
        )
    counts = results["runs"][0]["bytes"]
    table.caption = (
        f"mean over the clients: LoRA r=16 on all linear layers {human_bytes(counts['lora16_bytes'])}, "
        f"the model in bf16 {human_bytes(counts['model_bytes'])}; up counts against one way of each"
    )
    return table


def final_table(results: Mapping[str, Any], directory: Path, width: int = 110) -> str:
    """The end of a run as text: accuracies, bytes, where everything is."""
    console = Console(file=io.StringIO(), width=width, no_color=True)
    if results["runs"]:
        console.print(accuracy_table(results))
        if _accuracies(results, _strategies(results)[-1], OVERALL, "personal_accuracy")[-1]:
            console.print(accuracy_table(results, "personal_accuracy"))
        console.print(bytes_table(results))
    console.print(f"run directory: {directory}", soft_wrap=True)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def show(results: Mapping[str, Any], directory: Path, metrics: Sequence[str] = ()) -> None:
    """Print the tables to the terminal, in colour where it has any."""
    console = Console()
    for metric in metrics or ("global_accuracy",):
        console.print(accuracy_table(results, metric))
    console.print(bytes_table(results))
    console.print(f"run directory: {directory}", soft_wrap=True)
