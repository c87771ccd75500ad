"""How a run stands and what went wrong, in sentences."""

from __future__ import annotations

from datetime import UTC, datetime

from heterotune_flwr.report.blocks import (
    listed,
    plural,
)
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.identity import on_a_page
from heterotune_flwr.report.picks import (
    with_seed,
)

#: Names in a sentence; tables have all.
NAMED = 4


def moment(time: float | None) -> str:
    """A moment in words, in UTC; empty for none, and for one that no calendar has."""
    try:
        return "" if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return ""


def state_sentence(facts: RunFacts) -> str:
    """How the run stands, and why."""
    run = facts.identity
    reason = f" Reason: {on_a_page(run.reason).rstrip('.')}." if run.reason else ""
    seen = (
        f"{_reached(facts)} The last word of it is from {moment(run.last_event)}."
        if run.last_event
        else ""
    )
    match run.state:
        case "finished":
            return "The run finished."
        case "failed":
            return f"The run failed.{reason}{seen}"
        case "interrupted":
            return f"The run was interrupted: numbers are those it had reached.{reason}{seen}"
        case "running":
            return f"The run is not over: numbers are those it has reached.{seen}"
    return f"Nothing says how the run ended.{reason}{seen}"


def _reached(facts: RunFacts) -> str:
    """How far the strategies are that have not finished."""
    told_of = [
        f"{with_seed(facts, one.title, one.seed)}, {one.rounds_done} of {plural(one.rounds_planned, 'round')}"
        for one in facts.runs
        if one.state == "unfinished" and one.rounds_planned
    ]
    waiting = [
        with_seed(facts, one.title, one.seed) for one in facts.runs if one.state == "not_started"
    ]
    told_of += [f"not begun: {listed(waiting, NAMED)}"] if waiting else []
    return f" Reached: {'; '.join(told_of)}." if told_of else ""


def state_tone(facts: RunFacts) -> str:
    """Whether that is good news."""
    return {"finished": "good", "failed": "bad"}.get(facts.identity.state, "warn")


def trouble_sentence(facts: RunFacts) -> str:
    """How often what went wrong."""
    counts: dict[str, int] = {}
    for one in facts.happenings:
        counts[one.kind] = counts.get(one.kind, 0) + one.times
    names = {
        "refused": "refused update", "payload_refused": "refused payload", "client_failed": "failed answer",
        "cooldown": "cooldown", "skipped": "skipped round", "left_out": "node left out",
    }  # fmt: skip
    many = {"left_out": "nodes left out"}
    parts = [
        plural(counts[kind], one, many.get(kind, ""))
        for kind, one in names.items()
        if counts.get(kind)
    ]
    ended = {"failed": "The run failed", "interrupted": "The run was interrupted"}
    if end := ended.get(facts.identity.state, ""):
        before = listed(parts) if parts else "nothing was refused, skipped or lost"
        return f"{end}; before that: {before}."
    return f"{listed(parts)}." if parts else "Nothing was refused, skipped or lost."
