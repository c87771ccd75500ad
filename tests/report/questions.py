"""Ten questions about a run, each answered from what ``heterotune report --json`` says and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """``answer`` gives what a reader must find: names, sentences, numbers."""

    asked: str
    answer: Callable[[Facts], Any]


def outcomes(facts: Facts) -> list[Facts]:
    subject = facts["identity"]["subject"]
    return [one for one in facts["client_outcomes"] if one["strategy"] == subject]


def gains(facts: Facts, over: str) -> dict[str, float]:
    told = {one["client_id"]: one["gains"][f"federated_over_{over}"] for one in outcomes(facts)}
    return {client: gain for client, gain in told.items() if gain is not None}


def who_gained(facts: Facts) -> dict[str, float]:
    return {client: gain for client, gain in gains(facts, "bare").items() if gain > 0}


def who_lost(facts: Facts) -> dict[str, float]:
    return {client: gain for client, gain in gains(facts, "alone").items() if gain < 0}


def why_out(facts: Facts) -> dict[str, str]:
    return {c["client_id"]: c["why"] for c in facts["clients"] if c["state"] != "in"}


def what_travelled(facts: Facts) -> dict[str, int]:
    (one,) = (t for t in facts["traffic"] if t["strategy"] == facts["identity"]["subject"])
    names = (
        "train_up",
        "train_down",
        "evaluate_up",
        "evaluate_down",
        "one_time_up",
        "one_time_down",
    )
    return {name: one[name] for name in names}


def left_as_they_were(facts: Facts) -> dict[str, list[str]]:
    return {
        origin: [s["path"] for s in facts["settings"] if s["origin"] == origin]
        for origin in ("user", "preset", "default")
    }


def what_was_resumed(facts: Facts) -> dict[str, list[int]]:
    return {run["strategy"]: run["resumed_after"] for run in facts["runs"] if run["resumed_after"]}


def who_took_what(facts: Facts) -> dict[str, str]:
    return {one["client_id"]: one["took"] for one in outcomes(facts)}


def untouched_score(facts: Facts) -> dict[str, float]:
    return {
        row["scope"]: row["scores"]["accuracy"]["mean"]
        for row in facts["side_by_side"]
        if row["kind"] == "bare" and row["type_key"] == "all"
    }


def where_types_disagree(facts: Facts) -> tuple[str, str, int, float]:
    """The lowest cosine: slot, pair of types, round, cosine."""
    return min(
        (
            (one["slot"], pair, number, cosine)
            for one in facts["agreement"]
            for pair, cosines in one["cosines"].items()
            for number, cosine in zip(one["rounds"], cosines, strict=True)
            if cosine is not None
        ),
        key=lambda found: found[3],
    )


def what_took_the_time(facts: Facts) -> dict[str, float]:
    """Phase -> seconds, over all strategies, longest first."""
    total: dict[str, float] = {}
    for phase in facts["phases"]:
        if phase["name"] != "stopped":
            total[phase["name"]] = total.get(phase["name"], 0.0) + phase["seconds"]
    return dict(sorted(total.items(), key=lambda item: -item[1]))


QUESTIONS = {
    "gained": Question("Who gained?", who_gained),
    "lost": Question("Who lost?", who_lost),
    "out": Question("Why is a client out?", why_out),
    "travelled": Question("What travelled in which direction?", what_travelled),
    "defaults": Question("Which settings were left as they were?", left_as_they_were),
    "resumed": Question("What was resumed?", what_was_resumed),
    "took": Question("Which model did a client take?", who_took_what),
    "untouched": Question("What did the untouched model score?", untouched_score),
    "disagree": Question("Where do types disagree?", where_types_disagree),
    "time": Question("What took the time?", what_took_the_time),
}
