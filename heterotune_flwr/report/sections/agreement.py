"""Agreement and conflict between types over rounds, and what channels made of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from heterotune_flwr.report.blocks import Block, Cell, Prose, Section, Table, charts
from heterotune_flwr.report.charts.kinds import (
    Axis,
    HeatChart,
    Line,
    LineChart,
    is_empty,
    told,
)
from heterotune_flwr.report.facts import Agreement, RunFacts
from heterotune_flwr.report.picks import (
    average,
    lead,
    title_of,
)
from heterotune_flwr.report.sections.course import MOST_LINES


def agreement(facts: RunFacts) -> Section:
    """Agreement and conflict between types over rounds."""
    how = (
        "A cosine of +1 means that two types pulled the shared bank the same way in a round, 0 that they had nothing "
        "to do with each other, below 0 that they pulled against each other."
    )
    main = lead(facts)
    found = [one for one in facts.agreement if one.strategy == main.strategy] or facts.agreement
    found = [one for one in found if one.cosines]
    found = [one for one in found if one.seed == found[0].seed]  # of several seeds one is shown
    told_besides = [*_channels(facts), *(Prose(text) for text in _apart(facts))]
    if not found and not told_besides:
        why = "No round of this run tells it: only strategies that share one bank between types do."
        return Section("agreement", "Agreement between types", how, missing=why)
    blocks: list[Block] = []
    for one in found[:4]:
        conflicts = _conflicts(one)
        means = (
            None if is_empty(conflicts) else _last(one)
        )  # of two charts or four none stands alone
        blocks += charts(_cosines(one), _step(one), means, conflicts)
    blocks += [_agreement_table(facts, found)] if found else []
    return Section("agreement", "Agreement between types", how, [*blocks, *told_besides])


def _series(one: Agreement, values: Mapping[str, Sequence[float | None]]) -> list[Line]:
    lines = []
    for index, (name, row) in enumerate(list(values.items())[:MOST_LINES]):
        lines.append(Line(_brief(one, name), _known(one, row), index))
    return [line for line in lines if line.points]


def _known(one: Agreement, values: Sequence[float | None]) -> list[tuple[float, float]]:
    """Points (round, value) of the rounds that have one."""
    return [
        (float(place), value)
        for place, value in zip(one.rounds, values, strict=False)
        if value is not None
    ]


def _brief(one: Agreement, name: str) -> str:
    """Types of a line, without their bits where that tells them apart all the same."""
    keys = {key for pair in one.cosines for key in pair.split("|")}
    plain = len({key.partition("@")[0] for key in keys}) == len(keys)
    return " – ".join(key.partition("@")[0] if plain else key for key in name.split("|"))


def _where(one: Agreement) -> str:
    return one.slot if one.slot.startswith("slot") else f"slot {one.slot}"


def _cosines(one: Agreement) -> LineChart:
    y = Axis("cosine of two types' updates", "number")
    title = f"Agreement of types over rounds, {_where(one)}"
    return LineChart(title, Axis("round", "count", 0.0), y, _series(one, one.cosines))


def _step(one: Agreement) -> LineChart:
    y = Axis("cosine of a type's update with the step", "number")
    title = f"Agreement with the shared step, {_where(one)}"
    return LineChart(title, Axis("round", "count", 0.0), y, _series(one, one.with_step))


def _conflicts(one: Agreement) -> LineChart:
    y = Axis("pairs of types that pull apart", "share", 0.0, 1.0)
    title = f"Conflict rate over rounds, {_where(one)}"
    line = Line("conflicts", _known(one, one.conflict_rate), 1)
    return LineChart(title, Axis("round", "count", 0.0), y, [line])


def _last(one: Agreement) -> HeatChart:
    """Mean over all rounds, for every pair."""
    keys = sorted({key for pair in one.cosines for key in pair.split("|")})
    values: list[list[float | None]] = []
    for row in keys:
        line: list[float | None] = []
        for column in keys:
            told_of = one.cosines.get(f"{row}|{column}") or one.cosines.get(f"{column}|{row}") or []
            line.append(1.0 if row == column else average(told_of))
        values.append(line)
    return HeatChart(
        f"Agreement of types, mean over rounds, {_where(one)}",
        "type",
        "with",
        keys,
        keys,
        values,
        "cosine",
    )


def _agreement_table(facts: RunFacts, found: Sequence[Agreement]) -> Table:
    lines: list[list[Cell | str]] = []
    for one in found:
        for pair, row in one.cosines.items():
            known = [
                (value, place)
                for value, place in zip(row, one.rounds, strict=False)
                if value is not None
            ]
            if not known:
                continue
            values = [value for value, _ in known]
            lowest, when = min(known)
            against = sum(value < 0 for value in values) / len(values)
            lines.append([
                Cell(pair.replace("|", " – "), small=_where(one)),
                told(values[0], "cosine"), told(values[-1], "cosine"), told(statistics.fmean(values), "cosine"),
                Cell(told(lowest, "cosine"), small=f"round {when}"), told(against, "share"),
            ])  # fmt: skip
    heads = [
        "pair of types",
        "first round",
        "last round",
        "mean",
        "lowest",
        "rounds against each other",
    ]
    caption = f"{title_of(facts, found[0].strategy)}, seed {found[0].seed}"
    return Table(heads, lines, caption, frozenset({1, 2, 3, 4, 5}), "table-agreement")


def _channels(facts: RunFacts) -> list[Block]:
    """What channels said last: how much each type was listened to, how far classes agree."""
    lines: list[list[Cell | str]] = []
    for one in facts.channels:
        name = Cell(one.channel, small=title_of(facts, one.strategy))
        if one.off:
            lines.append([name, "off", one.off])
        for what, by_type in one.by_type.items():
            shares = ", ".join(f"{key} {told(value, 'number')}" for key, value in by_type.items())
            lines.append([name, what.replace("_", " "), shares])
        lines += [
            [name, what.replace("_", " "), told(value, "number")]
            for what, value in one.numbers.items()
        ]
    if not lines:
        return []
    heads = ["channel", "what", "at last"]
    return [
        Table(heads, lines, "What crosses types besides the bank", frozenset(), "table-channels")
    ]


def _apart(facts: RunFacts) -> list[str]:
    return [
        f"{one.type_key} shares nothing with other types: {one.apart}."
        for one in facts.types
        if one.apart
    ]
