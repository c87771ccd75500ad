"""What it cost: bytes by direction, memory, seconds."""

from __future__ import annotations

from heterotune_flwr.report.blocks import Block, Cell, Prose, Section, Table, charts
from heterotune_flwr.report.charts.kinds import (
    Axis,
    Bar,
    BarChart,
    BarGroup,
    Dot,
    DotChart,
    StackChart,
    told,
)
from heterotune_flwr.report.facts import RunFacts, Traffic
from heterotune_flwr.report.picks import style_of, title_of, with_seed
from heterotune_flwr.report.sections.clients import dot_row

_PARTS = ("training, up", "training, down", "tests, up", "tests, down", "once, up", "once, down")
#: Stretches of time in the order of their parts, and what people read for them.
_PHASES = {
    "training": "training and combining",
    "testing": "tests",
    "saving": "saving",
    "starting": "starting",
    "asking": "asking clients who they are",
    "aligning": "alignment from public texts",
    "stopped": "standing still between two starts",
}


def traffic(facts: RunFacts) -> Section:
    """Bytes by direction."""
    how = (
        "Up is from clients to the server, down the other way. What is sent once (who is there, and the maps between "
        "types) is booked apart, since it does not grow with rounds."
    )
    if not facts.traffic:
        return Section("bytes", "Bytes", how, missing="Nothing has travelled yet.")
    rows = [(_run_name(facts, one), _split(one)) for one in facts.traffic]
    chart = StackChart("Bytes by strategy and direction", "bytes", _PARTS, rows)
    lines: list[list[Cell | str]] = [
        [
            Cell(_run_name(facts, one), small="so far" if one.partial else ""),
            Cell(told(one.train_up, "bytes"), small=_each(one.up_each)),
            Cell(told(one.train_down, "bytes"), small=_each(one.down_each)),
            _both(one.evaluate_up, one.evaluate_down),
            _both(one.one_time_up, one.one_time_down),
            Cell(told(sum(_split(one)), "bytes"), small=_against_lora(one)),
        ]
        for one in facts.traffic
    ]
    heads = ["strategy", "training, up", "training, down", "tests", "once per run", "in all"]
    note = (
        "Small: a client and round. Saved: what training sends up in a round, against one way of LoRA r=16 on all "
        "linear layers; one-time bytes are not in it. Once per run: the questions before the first round were sent "
        "once for all strategies, and stand in the row of each; do not add them up."
    )
    table = Table(heads, lines, "", frozenset(range(1, 6)), "table-bytes", note=note)
    return Section("bytes", "Bytes", how, [table, *charts(chart), *_wire(facts)])


def _run_name(facts: RunFacts, one: Traffic) -> str:
    return with_seed(facts, title_of(facts, one.strategy), one.seed)


def _split(one: Traffic) -> list[float]:
    return [
        float(value or 0)
        for value in (
            one.train_up, one.train_down, one.evaluate_up, one.evaluate_down, one.one_time_up, one.one_time_down,
        )
    ]  # fmt: skip


def _both(up: int | None, down: int | None) -> Cell:
    directions = f"{told(up or 0, 'bytes')} up, {told(down or 0, 'bytes')} down"
    return Cell(told((up or 0) + (down or 0), "bytes"), small=directions)


def _each(count: float | None) -> str:
    return "" if count is None else f"{told(count, 'bytes')} each"


def _against_lora(one: Traffic) -> str:
    if not one.lora16_bytes or one.up_each is None:
        return ""
    share = one.up_each / one.lora16_bytes
    if share >= 1:
        return f"{share:.1f} times LoRA's"
    return "over 99.9 % saved" if 0 < share < 0.001 else f"{100 * (1 - share):.1f} % saved"


def _wire(facts: RunFacts) -> list[Block]:
    main = next(
        (one for one in facts.traffic if one.strategy == facts.identity.subject and one.wire_up),
        None,
    )
    if main is None:
        return []
    text = f"On the wire, as Flower writes it: {told(main.wire_up, 'bytes')} up, {told(main.wire_down, 'bytes')} down"
    what = (
        "That is every message of training and tests with what Flower adds to it, and with the maps that came along; "
        "the other one-time questions are not in it."
    )
    return [Prose(f"{text} ({title_of(facts, main.strategy)}). {what}")]


def memory(facts: RunFacts) -> Section:
    """Peak memory of clients' processes."""
    how = "The most memory a client's process held at once; in a simulation several clients share a process."
    blocks = _memory_by_type(facts) or _memory_by_strategy(facts)
    return Section("memory", "Memory", how, blocks, "No client told how much memory it used.")


def _memory_by_type(facts: RunFacts) -> list[Block]:
    """Of every client that told it; nothing where none did."""
    by_type: dict[str, list[Dot]] = {}
    for one in facts.clients:
        if one.peak_memory_mb is not None:
            dot = Dot(1e6 * one.peak_memory_mb, one.client_id)
            by_type.setdefault(one.type_key, []).append(dot)
    rows, lines = [], list[list[Cell | str]]()
    for index, (key, dots) in enumerate(sorted(by_type.items())):
        name = key or "unknown type"
        peaks = [dot.value for dot in dots]
        rows.append(dot_row(name, dots, index, "loss"))
        least, most = told(min(peaks), "bytes"), told(max(peaks), "bytes")
        lines.append([name, least, most, str(len(peaks))])
    axis = Axis("peak memory of a client's process", "bytes", 0.0)
    chart = DotChart("Peak memory by client and type", axis, rows)
    heads = ["type", "least", "most", "clients"]
    table = Table(heads, lines, "", frozenset({1, 2, 3}), "table-memory")
    return [*charts(chart), table] if rows else []


def _memory_by_strategy(facts: RunFacts) -> list[Block]:
    """The largest of each strategy's clients; nothing where none is known."""
    bars = [
        Bar(one.title, 1e6 * one.peak_memory_mb, style_of(facts, one.strategy))
        for one in facts.runs
        if one.peak_memory_mb is not None
    ]
    axis = Axis("peak memory of a client", "bytes", 0.0)
    chart = BarChart("Peak memory by strategy", axis, [BarGroup("", bars)])
    lines: list[list[Cell | str]] = [[bar.name, told(bar.value, "bytes")] for bar in bars]
    table = Table(["strategy", "peak"], lines, "", frozenset({1}), "table-memory")
    return [*charts(chart), table] if bars else []


def seconds(facts: RunFacts) -> Section:
    """Where the time went."""
    how = (
        "Set-up (starting, asking who is there, alignment, standing still) is shared by all strategies of a run and "
        "booked apart; training, tests and saving belong to one strategy, the test before its first round too. "
        "Where the terminal says that a strategy is done in so many seconds, the set-up just before it is in them."
    )
    if not facts.phases:
        return Section(
            "seconds", "Seconds", how, missing="The journal does not tell when anything began."
        )
    owners = list(dict.fromkeys((one.strategy, one.seed) for one in facts.phases))
    there = {one.name for one in facts.phases}
    names = [*(name for name in _PHASES if name in there), *sorted(there - set(_PHASES))]
    parts = [_PHASES.get(name, name) for name in names]
    rows, lines = [], list[list[Cell | str]]()
    for strategy, seed in owners:
        mine = [one for one in facts.phases if (one.strategy, one.seed) == (strategy, seed)]
        name = title_of(facts, strategy) if strategy else "shared set-up"
        label = with_seed(facts, name, seed)
        values = [sum(one.seconds for one in mine if one.name == part) for part in names]
        longest = max(range(len(values)), key=lambda index: values[index])
        computed = [one.clients_seconds for one in mine if one.clients_seconds is not None]
        rows.append((label, values))
        lines.append([label, told(sum(values), "seconds"), f"{parts[longest]} ({told(values[longest], 'seconds')})",
                      told(sum(computed), "seconds") if computed else "–"])  # fmt: skip
    table = Table(
        ["what", "seconds", "longest part", "clients' own, added up"],
        lines,
        "",
        frozenset({1, 3}),
        "table-seconds",
    )
    chart = StackChart("Seconds by strategy and phase", "seconds", parts, rows)
    by_phase = {
        name: sum(one.seconds for one in facts.phases if one.name == name) for name in names
    }
    order = sorted(by_phase.items(), key=lambda item: -item[1])
    phase_lines: list[list[Cell | str]] = [
        [_PHASES.get(name, name), told(value, "seconds")] for name, value in order
    ]
    phases = Table(
        ["part", "seconds, all strategies"], phase_lines, "", frozenset({1}), "table-phases"
    )
    at_work = sum(one.seconds for one in facts.phases if one.name != "stopped")
    total = Prose(f"At work for {told(at_work, 'seconds')} in all.", "answer-seconds")
    return Section("seconds", "Seconds", how, [total, *charts(chart), table, phases])
