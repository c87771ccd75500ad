"""A run's facts for a terminal, below its tables: how it stands, and what went out of the ordinary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from heterotune_flwr.federation.resume import going_on
from heterotune_flwr.names import printable
from heterotune_flwr.report.facts import Happening, RunFacts

#: Happenings of one kind that have a line each.
_LINES = 5
#: What is no news below the tables.
_QUIET = ("channel_note", "already_finished", "started_again", "returned")


def standing(facts: RunFacts) -> list[str]:
    """Lines about state, resumes, strategies that are not finished, what happened, and what is missing."""
    about = facts.identity
    lines = []
    if about.state != "finished" or about.resumed:
        reason = f" ({about.reason})" if about.reason else ""
        again = f", started {len(about.starts)} times" if about.resumed else ""
        lines.append(f"the run is {about.state}{again}{reason}")
    for run in facts.runs:
        name = f"{run.title}, seed {run.seed}"
        if run.state == "unfinished":
            lines.append(f"{name}: {run.rounds_done} of {run.rounds_planned or '?'} rounds done")
        elif run.state == "not_started":
            lines.append(f"{name}: not started")
    command = going_on(Path(about.directory), about.simulated)
    if about.state in ("interrupted", "failed") and command:
        lines.append(f"go on with it: {command}")
    lines += [*_happened(facts.happenings), *facts.trouble]
    return [printable(line.replace("\n", " ")) for line in lines]


def _happened(happenings: Sequence[Happening]) -> list[str]:
    told = [one for one in happenings if one.kind not in _QUIET]
    shown: Counter[str] = Counter()
    lines = []
    for one in told:
        shown[one.kind] += 1
        if shown[one.kind] <= _LINES:
            where = f"{one.strategy}, seed {one.seed}" if one.strategy else ""
            where += f", round {one.round}" if where and one.round is not None else ""
            times = f" ({one.times} times)" if one.times > 1 else ""
            lines.append(f"{where}: {one.text}{times}" if where else f"{one.text}{times}")
    more = {kind: count - _LINES for kind, count in shown.items() if count > _LINES}
    return lines + [
        f"... and {count} more of {kind.replace('_', ' ')}" for kind, count in more.items()
    ]
