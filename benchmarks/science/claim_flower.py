"""Rows of the headline that are real Flower simulations: one run of some strategies and seeds, and a claim's trials."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from benchmarks.runner import Cells, flower_run, machine
from benchmarks.science.claim_cells import Trials
from benchmarks.science.headline_suites import CLAIM_ROWS, SUITES, ClaimRow, trial

_FIELDS = ("client_id", "type", "global_accuracy", "personal_accuracy")
#: Rounds between tests on dev, of rows that stop early.
_EVERY = 2


def simulated(
    suite: str, strategies: Mapping[str, Any], seeds: Sequence[int], overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """The runs of one simulation: every strategy by every seed."""
    preset = SUITES[suite].compared(suite, strategies, seeds)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(preset, file)
        file.flush()
        runs: list[dict[str, Any]] = flower_run(file.name, overrides)["runs"]
    return runs


def cell_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "clients": [{field: row[field] for field in _FIELDS} for row in run["clients"]],
        "bytes": run["bytes"], "seconds": round(run["seconds"], 1),
        "peak_memory_mb": run["peak_memory_mb"], "machine": machine(),
    }  # fmt: skip


def best_round(run: Mapping[str, Any]) -> tuple[int, float]:
    """(round, mean accuracy over clients) of the test after which a run is best; the first of equals."""
    found: dict[int, float] = {}
    for entry in run["rounds"]:
        if entry.get("event") == "evaluate" and entry["round"] > 0:
            types = entry["types"].values()
            right = sum(own["clients"] * own["global_accuracy_mean"] for own in types)
            found[entry["round"]] = right / sum(own["clients"] for own in types)
    best = max(found, key=lambda number: found[number])
    return best, found[best]


class FlowerTrials(Trials):
    """A row of a claim that is a strategy of the package."""

    def __init__(self, suite: str, name: str, cells: Cells) -> None:
        self.row: ClaimRow = CLAIM_ROWS[name]
        super().__init__(suite, name, self.row, cells)

    def run(
        self, variant: str, values: Sequence[float], seeds: Sequence[int], part: str
    ) -> dict[str, Any]:
        """See :class:`Trials`.

        Where a run takes hours, one simulation per seed, kept as it comes: one cut short loses a seed, not all. Where
        it takes seconds a single one, since starting takes longer.
        """
        known, new = self.cells.read(), {}
        overrides = [*SUITES[self.suite].overrides(part), *self._stops(variant, values, part)]
        for own in [[seed] for seed in seeds] if self.row.stops_early else [seeds]:
            wanted = {
                f"{value:g}": trial(self.name, value, variant)
                for value in values
                if any(self.key(variant, value, seed) not in known for seed in own)
            }
            runs = simulated(self.suite, wanted, own, overrides) if wanted else []
            for run in runs:
                cell = cell_of(run)
                if self.row.stops_early and part == "dev":
                    cell["best_round"], cell["best_accuracy"] = best_round(run)
                new[self.key(variant, float(run["strategy"]), run["seed"])] = cell
            self.cells.keep(new)
        return new

    def _stops(self, variant: str, values: Sequence[float], part: str) -> list[str]:
        """Overrides of a row that stops early: tests on the way, or as many rounds as were best on dev."""
        if not self.row.stops_early:
            return []
        if part == "dev":
            return [f"server.evaluate_every={_EVERY}"]
        (value,), known = values, self.cells.read()
        seeds = SUITES[self.suite].sweep_of(self.name)
        rounds = [known[self.key(variant, value, seed)]["best_round"] for seed in seeds]
        return [f"server.rounds={round(sum(rounds) / len(rounds))}"]
