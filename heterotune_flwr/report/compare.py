"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from heterotune_flwr.report.facts import Comparison, RunFacts
from heterotune_flwr.report.read import read_facts


def read_comparison(directories: Sequence[Path]) -> Comparison:
    """Read several run directories (ConfigError: one is none, or cannot be read)."""
    return compare([read_facts(directory) for directory in directories])


def compare(runs: Sequence[RunFacts]) -> Comparison:
    """Runs by name (those of one name by their folders'), and the settings in which they differ."""
    named: dict[str, RunFacts] = {}
    names = [run.identity.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        folder = Path(run.identity.directory).name
        chosen = name if names.count(name) == 1 else folder
        number = 2
        while chosen in named:
            chosen, number = f"{folder} ({number})", number + 1
        named[chosen] = run
    values = {name: {fact.path: fact.value for fact in run.settings} for name, run in named.items()}
    paths = dict.fromkeys(path for told in values.values() for path in told)
    table = {path: {name: told.get(path) for name, told in values.items()} for path in paths}
    return Comparison(
        named,
        {
            path: row
            for path, row in table.items()
            if any(value != next(iter(row.values())) for value in row.values())
        },
    )
