"""What went out of the ordinary: refusals, failures, cooldowns, skipped rounds, resumes, each as a sentence."""

from __future__ import annotations

from collections.abc import Callable

from heterotune_flwr.federation.journal import client_of
from heterotune_flwr.jsons import as_list, as_number, as_whole
from heterotune_flwr.report.facts import Happening
from heterotune_flwr.report.files import Event, RunFiles, key_of


def _failed_type(event: Event) -> str:
    return "its training" if event.get("message_type", "train") == "train" else "its test"


#: Event -> its sentence.
SENTENCES: dict[str, Callable[[Event], str]] = {
    "refused": lambda e: f"an update of {e.get('client_id')} was refused: {e.get('reason')}",
    "payload_refused": lambda e: (
        f"what {e.get('client_id')} sent for {e.get('channel')} was refused: {e.get('reason')}"
    ),
    "client_failed": lambda e: (
        f"{e.get('client_id')} failed in {_failed_type(e)}: {e.get('reason')}"
    ),
    "sent_again": lambda e: f"{e.get('client_id')} was asked again: {e.get('reason')}",
    "cooldown": lambda e: (
        f"{e.get('client_id')} failed too often and was not asked until after round {e.get('until')}"
    ),
    "returned": lambda e: f"{e.get('client_id')} was asked again after its cooldown",
    "left_out": lambda e: f"{client_of(e)} did not take part: {e.get('reason')}",
    "skipped": lambda e: (
        f"round {e.get('round')} was skipped: {e.get('usable')} usable updates, "
        f"{e.get('needed')} needed"
    ),
    "resumed": lambda e: (
        f"the run was resumed after round {e.get('round')}; later rounds were done again"
    ),
    "already_finished": lambda e: f"{e.get('strategy')} had finished in an earlier start",
    "shortened": lambda e: (
        f"an update of {e.get('client_id')} was longer than one client's may be, and shortened"
    ),
    "counted_less": lambda e: (
        f"clients counted as at most {e.get('most')} examples each: "
        f"{', '.join(map(str, as_list(e.get('clients'))))}"
    ),
    "round_closed": lambda e: (
        f"round {e.get('round')} did not wait for "
        f"{', '.join(map(str, as_list(e.get('unawaited'))))}"
    ),
    "channel_off": lambda e: f"{e.get('channel')} was off: {e.get('reason')}",
    "channel_note": lambda e: f"{e.get('channel')}: {e.get('text')}",
    "apart": lambda e: f"{e.get('type')} shared nothing with other types: {e.get('reason')}",
    "unchecked": lambda e: (
        f"one client alone told how {e.get('type')} is aligned: {e.get('reason')}"
    ),
    "factors_refused": lambda e: (
        f"what a client of {e.get('type')} told for the alignment was refused: {e.get('reason')}"
    ),
    "checkpoint_damaged": lambda e: (
        f"a checkpoint was damaged, an older one was taken: {e.get('reason')}"
    ),
    "results_unreadable": lambda e: (
        f"results.json was damaged and made anew from checkpoints: {e.get('reason')}"
    ),
    "failed": lambda e: f"the run ended: {e.get('reason')}",
}


def happenings(files: RunFiles) -> list[Happening]:
    """In order; equal ones of a client in one strategy and seed are one entry, with the round of the first."""
    found: dict[tuple[object, ...], Happening] = {}
    starts = 0
    last = max(
        (p for p, e in enumerate(files.events) if e["event"] in ("starting", "journal")), default=0
    )
    for place, event in enumerate(files.events):
        kind = event["event"]
        if event.get("torn_line") is True:
            text = "the start before ended in the middle of a line of the journal"
            found[place,] = Happening("torn_line", text, as_number(event.get("time")))
        if kind == "journal":
            starts += 1
            if starts > 1:
                text = f"the run was started again (start {starts})"
                found[place, starts] = Happening(
                    "started_again", text, as_number(event.get("time"))
                )
        if kind not in SENTENCES:
            continue
        strategy, seed = key_of(event) or ("", None)
        undone = place in files.undone
        client, reason = str(event.get("client_id") or ""), str(event.get("reason") or "")
        mark: tuple[object, ...] = (
            kind,
            strategy,
            seed,
            client,
            reason,
            str(event.get("channel")),
            undone,
        )
        if not client:
            mark = (*mark, place)
        if mark in found:
            found[mark].times += 1
            continue
        number = event.get("round")
        earlier = kind == "failed" and place < last
        found[mark] = Happening(
            kind,
            f"start {starts} of the run ended: {reason}" if earlier else SENTENCES[kind](event),
            as_number(event.get("time")),
            strategy,
            seed,
            None if number is None else as_whole(number),
            client,
            reason,
            undone=undone,
        )
    return list(found.values())
