"""What went wrong, what was left as shipped, what protects whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from heterotune_flwr.report.blocks import (
    Block,
    Cell,
    Folded,
    Items,
    Prose,
    Section,
    Table,
    listed,
    plural,
)
from heterotune_flwr.report.facts import Happening, RunFacts, SettingFact
from heterotune_flwr.report.identity import on_a_page
from heterotune_flwr.report.picks import left_as, origin_of, title_of, with_seed
from heterotune_flwr.report.sections.state import moment

#: Events with a row of their own; of more the last ones.
_MOST = 60
#: What is worth reading, and no trouble.
_NOTES = frozenset({"channel_note", "returned", "already_finished"})
_KINDS = {
    "refused": "update refused",
    "payload_refused": "payload refused",
    "client_failed": "no usable answer",
    "sent_again": "asked again",
    "left_out": "left out",
    "skipped": "round skipped",
    "channel_off": "channel off",
    "channel_note": "channel's note",
    "counted_less": "counted less",
    "checkpoint_damaged": "checkpoint damaged",
    "results_unreadable": "results unreadable",
}


def trouble(facts: RunFacts) -> Section:
    """Refusals, cooldowns, resumes, skipped rounds, with reasons."""
    how = "In the order of time, with the reason that was given; equal ones of a client stand in one row."
    blocks: list[Block] = []
    starts = [
        f"Start {number} at {moment(one.time) or 'an unknown time'}"
        + (", resumed" if one.resumed else "")
        + (", after a start that ended in the middle of a line" if one.torn_line else "")
        + "."
        for number, one in enumerate(facts.identity.starts, 1)
    ]
    if facts.runs:
        blocks.append(_strategies(facts))
    out = [one for one in facts.clients if one.state != "in"]
    if out:
        lines: list[list[Cell | str]] = [
            [Cell(one.client_id, small=one.type_key), one.state.replace("_", " "), on_a_page(one.why) or "not told",
             str(one.answers), f"{one.failures} / {one.refusals}"]
            for one in out[:_MOST]
        ]  # fmt: skip
        heads = ["client", "how", "why", "answers", "failures / refusals"]
        blocks.append(Table(heads, lines, "Clients that are out", frozenset({3, 4}), "table-out"))
    wrong = [one for one in facts.happenings if one.kind not in _NOTES]
    notes = [one for one in facts.happenings if one.kind in _NOTES]
    if wrong:
        blocks.append(_table(facts, wrong, "Events", "table-trouble"))
    else:
        text = "Nothing out of the ordinary: no update refused, no round skipped, no client lost."
        blocks.append(Prose(text))
    if notes:
        blocks.append(_table(facts, notes, "Notes", "table-notes"))
    if len(starts) > 1:
        blocks += [Prose("Starts of this run:"), Items(starts, "starts")]
    if facts.trouble:
        blocks += [Prose("Of the run's own files:"), _told(facts.trouble, "files-trouble")]
    if facts.identity.notes:
        blocks += [
            Prose("Said of the data before the run:"),
            _told(facts.identity.notes, "data-notes"),
        ]
    if facts.untold:
        blocks += [Prose("Not told:"), Items(facts.untold, "untold")]
    return Section("trouble", "What went wrong", how, blocks)


def _told(texts: Sequence[str], anchor: str) -> Items:
    return Items([on_a_page(text) for text in texts], anchor)


def _strategies(facts: RunFacts) -> Table:
    """How far each strategy got."""
    lines: list[list[Cell | str]] = []
    for one in facts.runs:
        name = with_seed(facts, one.title, one.seed)
        tone = {"finished": "good", "unfinished": "bad"}.get(one.state, "quiet")
        rounds = (
            str(one.rounds_done)
            if one.rounds_planned is None
            else f"{one.rounds_done} of {one.rounds_planned}"
        )
        skipped, resumed = (
            listed([str(number) for number in numbers], 8) if numbers else "none"
            for numbers in (one.skipped_rounds, one.resumed_after)
        )
        lines.append([name, Cell(one.state.replace("_", " "), tone), rounds, skipped, resumed])
    heads = ["strategy", "state", "rounds", "skipped rounds", "resumed after round"]
    return Table(heads, lines, "How far each strategy got", frozenset(), "table-strategies")


def _table(facts: RunFacts, found: Sequence[Happening], caption: str, anchor: str) -> Table:
    shown = found[-_MOST:]
    lines = [_happening(facts, one) for one in shown]
    left = len(found) - len(shown)
    note = f"The {left} before are in report --json." if left else ""
    return Table(["when", "what", "who", "in words"], lines, caption, anchor=anchor, note=note)


def _happening(facts: RunFacts, one: Happening) -> list[Cell | str]:
    where = [title_of(facts, one.strategy)] if one.strategy else []
    if one.seed is not None and len(facts.identity.seeds) > 1:
        where.append(f"seed {one.seed}")
    if one.round is not None:
        where.append(f"round {one.round}")
    if not where:
        where = [moment(one.time) or "–"]
    times = f" {one.times} times" if one.times > 1 else ""
    undone = "done again after a resume" if one.undone else ""
    what = f"{_KINDS.get(one.kind, one.kind.replace('_', ' '))}{times}"
    return [
        ", ".join(where),
        Cell(what, small=undone),
        one.client_id or "–",
        on_a_page(one.text or one.reason),
    ]


def settings(facts: RunFacts) -> Section:
    """Which settings were chosen, and which were left."""
    how = "Chosen settings come first; one that was left as a demonstration ships it was never fitted to your data."
    if not facts.settings:
        return Section(
            "settings", "Settings", how, missing="The run directory has no readable config.yaml."
        )
    groups = {
        origin: [one for one in facts.settings if origin_of(one) == origin]
        for origin in ("user", "preset", "default", "unknown")
    }
    preset = left_as(facts.preset)
    blocks: list[Block] = []
    if groups["unknown"]:
        blocks.append(
            Prose("This run does not say which of its settings were chosen and which were left.")
        )
        changed = [one for one in groups["unknown"] if one.value != one.default]
        blocks.append(_settings_table(changed, "Other than the program's default", "table-unknown"))
    else:
        mine = groups["user"]
        blocks.append(
            _settings_table(mine, "Chosen for this run", "table-chosen")
            if mine
            else Prose(
                "Nothing was chosen for this run: every setting is as it ships.", "table-chosen"
            )
        )
        blocks.append(Prose(
            f"{plural(len(groups['preset']), 'setting')} taken from {preset}, and "
            f"{plural(len(groups['default']), 'setting')} at the program's default.", "left-at"))  # fmt: skip
    for origin, title, anchor in (
        ("preset", f"Taken from {preset}", "table-preset"),
        ("default", "Left at the program's default", "table-default"),
    ):
        if groups[origin]:
            table = _settings_table(groups[origin], "", anchor)
            blocks.append(Folded(f"{title} ({len(groups[origin])})", [table]))
    if facts.identity.versions:
        programs = [
            f"{name} {version}" for name, version in sorted(facts.identity.versions.items())
        ]
        blocks.append(Prose(f"Programs: {', '.join(programs)}.", "programs", "quiet"))
    return Section("settings", "Settings", how, blocks)


def _settings_table(found: Sequence[SettingFact], caption: str, anchor: str) -> Table:
    lines: list[list[Cell | str]] = [
        [
            Cell(one.path, small=one.help),
            shown(one.value),
            shown(one.default),
        ]
        for one in found
    ]
    return Table(["setting", "here", "default"], lines, caption, frozenset(), anchor)


def shown(value: Any) -> str:
    """A setting's value in a line; where there is none, one word says so."""
    if value is None or value in ("", [], {}):
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return on_a_page(text)


def protection(facts: RunFacts) -> Section:
    """What protects whom."""
    how = "Each row is one safeguard, whom it protects, and whether it was on in this run."
    if not facts.protections:
        return Section(
            "protection",
            "What protects whom",
            how,
            missing="The run's files do not tell its safeguards.",
        )
    states = {True: Cell("on", "good"), False: Cell("off", "bad"), None: Cell("not told", "quiet")}
    lines: list[list[Cell | str]] = [
        [one.name, one.protects, states[one.on], one.sentence] for one in facts.protections
    ]
    table = Table(
        ["safeguard", "protects", "here", "what it does"],
        lines,
        "",
        frozenset(),
        "table-protection",
    )
    off = [one.name for one in facts.protections if one.on is False]
    text = (
        f"Off in this run: {listed(off, 10)}."
        if off
        else "Every safeguard that the files tell of was on."
    )
    return Section(
        "protection", "What protects whom", how, [Prose(text, "answer-protection"), table]
    )
