"""What a run cost: bytes by direction, the one-time part apart, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heterotune_flwr.jsons import as_mapping, as_number, as_numbers, as_whole, whole_or_none
from heterotune_flwr.report.facts import Phase, StrategyRun, Traffic
from heterotune_flwr.report.files import Event, Key, RunFiles, key_of

#: What is being done while an event is waited for; those that others add to are in :func:`_doing`.
_DOING = {
    "describe": "asking",
    "left_out": "asking",
    "aligning": "asking",
    "align": "aligning",
    "factors_refused": "aligning",
    "unchecked": "aligning",
    "apart": "aligning",
    "train_reply": "training",
    "round": "training",
    "round_closed": "training",
    "skipped": "training",
    "guests": "teaching guests",
    "slices": "testing",
    "evaluate": "testing",
    "took_home": "testing",
    "checkpoint": "saving",
    "strategy_end": "saving",
}
#: Of what a long exchange tells how far it is; of others: a test.
_PROGRESS = {"connecting": "asking", "asking": "asking", "aligning": "aligning"}
_SHARED = ("starting", "asking", "aligning")
#: Events with which a start of the run begins.
_OPENING = ("data", "starting", "journal")


def phases(files: RunFiles) -> list[Phase]:
    """Where the time went, by the journal: the wait for an event is what it tells of.

    What is done before strategies begin (asking, aligning) is shared, and booked to none. ``stopped`` is the time
    between an end and the next start. Rounds that were done again count as well.
    """
    seconds: dict[tuple[str, str, int | None], float] = {}
    worked: dict[tuple[str, str, int | None], float] = {}
    before: float | None = None
    doing, opening = "starting", True
    at_work: tuple[str, int | None] = ("", None)
    for event in files.events:
        at = as_number(event.get("time"))
        if at is None:
            continue
        again = event["event"] in _OPENING and not opening
        doing, opening = "stopped" if again else _doing(event, doing), event["event"] in _OPENING
        at_work = key_of(event) or at_work
        strategy, seed = at_work
        place = (doing, "", None) if doing in (*_SHARED, "stopped") else (doing, strategy, seed)
        if before is not None:
            seconds[place] = seconds.get(place, 0.0) + max(0.0, at - before)
        if event["event"] == "train_reply" and (own := as_number(event.get("seconds"))) is not None:
            worked[place] = worked.get(place, 0.0) + own
        before = at
    return [Phase(*place, length, worked.get(place)) for place, length in seconds.items()]


def _doing(event: Event, before: str) -> str:
    """What was being done until an event; ``before``: until the one before it."""
    kind = event["event"]
    if kind in _OPENING:
        return "starting"
    if kind in ("asking", "start"):
        return before if before in _SHARED else "starting"
    if kind == "progress":
        return _PROGRESS.get(str(event.get("what")), "testing")
    if kind in ("bytes", "client_failed", "sent_again"):
        return "testing" if event.get("message_type") == "evaluate" else "training"
    return _DOING.get(kind, before)


def traffic(files: RunFiles, runs: Sequence[StrategyRun]) -> list[Traffic]:
    """Bytes of every strategy and seed: by the ledger of a finished one, else by its messages so far."""
    messages: dict[tuple[str, int], list[Event]] = {}
    for event in files.of("bytes", undone=True):
        if key := key_of(event):
            messages.setdefault(key, []).append(event)
    found, aligned = [], _aligned(files)
    for run in runs:
        counted = as_mapping(files.results.get(run.key, {}).get("bytes"))
        if counted:
            found.append(_counted(run, counted))
        elif run.key in messages:
            found.append(_so_far(run, messages[run.key], aligned.get(run.key, 0)))
    return found


def _aligned(files: RunFiles) -> dict[Key, int]:
    """What clients sent for the alignment in the starts of the run in which a strategy ran, before it began."""
    found: dict[Key, int] = {}
    before: dict[int, int] = {}
    for event in files.events:
        seed, key = as_whole(event.get("seed")), key_of(event)
        if event["event"] == "journal":
            before.clear()
        elif event["event"] == "align":
            before[seed] = before.get(seed, 0) + as_whole(event.get("bytes_up"))
        elif event["event"] == "start" and key:
            found[key] = found.get(key, 0) + before.get(seed, 0)
    return found


def _counted(run: StrategyRun, counted: Mapping[str, Any]) -> Traffic:
    one = Traffic(
        run.strategy,
        run.seed,
        up_each=as_number(counted.get("up_per_client_round")),
        down_each=as_number(counted.get("down_per_client_round")),
        lora16_bytes=as_number(counted.get("lora16_bytes")),
        model_bytes=as_number(counted.get("model_bytes")),
    )
    names = (
        "train_up", "train_down", "evaluate_up", "evaluate_down", "one_time_up", "one_time_down",
        "wire_up", "wire_down", "client_rounds",
    )  # fmt: skip
    for name in names:
        if (value := whole_or_none(counted.get(name))) is not None:
            setattr(one, name, value)
    for type_key, facts in as_mapping(counted.get("types")).items():
        one.by_type[type_key] = as_numbers(facts)
    return one


def _so_far(run: StrategyRun, events: Sequence[Event], aligned: int) -> Traffic:
    """Of one-time bytes the journal has the maps, and ``aligned``: what clients told for the alignment."""
    one = Traffic(run.strategy, run.seed, one_time_up=aligned, one_time_down=0, partial=True)
    for event in events:
        up, down, maps = (as_whole(event.get(name)) for name in ("up", "down", "maps"))
        one.one_time_down = (one.one_time_down or 0) + maps
        one.wire_up += as_whole(event.get("wire_up"))
        one.wire_down += as_whole(event.get("wire_down"))
        if event.get("message_type") == "evaluate":
            one.evaluate_up += up
            one.evaluate_down += down - maps
        else:
            one.train_up += up
            one.train_down += down - maps
            one.client_rounds += 1
    if one.client_rounds:
        one.up_each, one.down_each = (
            one.train_up / one.client_rounds,
            one.train_down / one.client_rounds,
        )
    return one
