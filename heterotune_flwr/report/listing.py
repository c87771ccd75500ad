"""The runs there are, in a line each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import to_json
from heterotune_flwr.names import printable
from heterotune_flwr.report.files import read_files
from heterotune_flwr.report.identity import identity
from heterotune_flwr.report.measured import ALL_TYPES
from heterotune_flwr.report.outcomes import type_outcomes
from heterotune_flwr.report.read import strategy_runs
from heterotune_flwr.reporting.status import ago
from heterotune_flwr.reporting.tables import TITLES, human_bytes


@dataclass
class RunLine:
    """One run.

    ``numbers``: by strategy, its ``measure`` on the test ``scope``, a mean over clients and seeds. ``reason``: why it
    failed, or cannot be read. Of ``parts`` (a strategy with a seed) ``finished`` are over; ``rounds_done`` are those of
    the part under way, or of all where none is.
    """

    directory: str
    name: str
    state: str
    reason: str = ""
    strategies: list[str] = field(default_factory=list)
    seeds: int = 0
    parts: int = 0
    finished: int = 0
    rounds_done: int = 0
    rounds: int | None = None
    clients: int = 0
    measure: str = ""
    scope: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    bytes_on_disk: int = 0
    created: float | None = None
    last_event: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = to_json(asdict(self))
        return found


def list_runs(folder: Path) -> list[RunLine]:
    """Runs in a folder and in the folders there, newest first, named by their path (ConfigError: no such folder)."""
    folder = folder.expanduser()
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be listed: {error.strerror or error}; name the folder that holds runs"
        ) from error
    places: list[Path] = []
    for one in (folder, *inside):
        if _holds_run(one):
            places.append(one)
        elif one is not folder:  # `heterotune new` makes folders whose runs lie in them
            places += filter(_holds_run, _inside(one))
    found = [run_line(place, folder) for place in places]
    return sorted(found, key=lambda line: -(line.created or 0.0))


def _holds_run(place: Path) -> bool:
    return any((place / name).is_file() for name in ("rounds.jsonl", "results.json"))


def _inside(place: Path) -> list[Path]:
    """What lies in a folder; nothing where it is none, or closed."""
    try:
        return sorted(place.iterdir())
    except OSError:
        return []


def run_line(directory: Path, folder: Path) -> RunLine:
    """The line of a run in a folder; what cannot be read is said in it."""
    name = str(directory.relative_to(folder)) if directory != folder else folder.absolute().name
    try:
        files = read_files(directory)
    except ConfigError as error:
        return RunLine(str(directory), name, "unreadable", str(error))
    runs = strategy_runs(files)
    about = identity(files, runs)
    measure, scope = next(((r.measure, r.scope) for r in runs if r.measure), ("", ""))
    told: dict[str, list[float]] = {}
    for one in type_outcomes(files, runs, []):
        spread = one.after.get(scope, {}).get(measure)
        if one.type_key == ALL_TYPES and spread is not None:
            told.setdefault(one.strategy, []).append(spread.mean)
    under_way = [run for run in runs if run.state == "unfinished"]
    return RunLine(
        directory=about.directory,
        name=name,
        state=about.state,
        reason=about.reason,
        strategies=about.strategies,
        seeds=len(about.seeds),
        parts=len(runs),
        finished=sum(run.state == "finished" for run in runs),
        rounds_done=min((run.rounds_done for run in under_way or runs), default=0),
        rounds=about.rounds,
        clients=about.clients,
        measure=measure,
        scope=scope,
        numbers={name: sum(values) / len(values) for name, values in told.items()},
        bytes_on_disk=about.bytes_on_disk,
        created=about.created,
        last_event=about.last_event,
    )


def _how_far(run: RunLine) -> list[str]:
    """Of an unfinished run first how many strategies are over."""
    rounds = f"round {run.rounds_done} of {run.rounds or '?'}"
    if run.parts < 2 or run.finished == run.parts:
        return [rounds]
    what = "strategies" if run.seeds < 2 else "strategies and seeds"
    over = f"{run.finished} of {run.parts} {what} finished"
    return [f"{over}, {rounds} of the next" if run.rounds_done else over]


def lines(runs: Sequence[RunLine], now: float | None = None) -> list[str]:
    """The list for a terminal, a run in two lines."""
    now = time.time() if now is None else now
    width = max((len(run.name) for run in runs), default=0)
    found = []
    for run in runs:
        if run.state == "unreadable":
            found.append(f"{run.name:{width}}  {run.state}: {run.reason}")
            continue
        age = f"{ago(now - run.created)} old" if run.created else "of unknown age"
        about = [f"{run.name:{width}}", run.state, age, human_bytes(run.bytes_on_disk)]
        if run.clients:
            about.append(f"{run.clients} clients")
        about += _how_far(run)
        found.append("  ".join(about))
        scores = [
            f"{TITLES.get(name, name)} {100 * run.numbers[name]:.1f} %" if name in run.numbers
            else TITLES.get(name, name)
            for name in run.strategies
        ]  # fmt: skip
        tests = "own tests" if run.scope == "personal" else "the global test"
        measured = f" ({run.measure.replace('_', '-')} on {tests})" if run.numbers else ""
        if scores:
            found.append(f"{'':{width}}  {', '.join(scores)}{measured}")
        if run.reason and run.state not in ("finished", "running"):
            found.append(f"{'':{width}}  {run.reason}")
    return [printable(line.replace("\n", " ")) for line in found]
