"""How it went: curves over rounds and bytes, alignment."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from heterotune_flwr.report.blocks import Block, Cell, Section, Table, charts
from heterotune_flwr.report.charts.kinds import (
    Axis,
    Bar,
    BarChart,
    BarGroup,
    Line,
    LineChart,
    told,
)
from heterotune_flwr.report.facts import Alignment, RunFacts
from heterotune_flwr.report.measured import ALL_TYPES, Curve
from heterotune_flwr.report.picks import (
    MEASURE_NAMES,
    Lead,
    lead,
    number,
    style_of,
    title_of,
    two_untouched,
    unit_of,
)

#: Lines that can be told apart in one chart.
MOST_LINES = 8


def curves(facts: RunFacts) -> Section:
    """Over rounds, and over bytes."""
    how = (
        "Left to right is time in rounds, or what training has sent so far in both directions: "
        "the line that is high early learns fast, the one that is high at few bytes learns cheaply."
    )
    main = lead(facts)
    test = f"{main.scope}_{main.measure}"
    drawn = [
        *[_by_strategy(facts, test, main, over) for over in ("rounds", "bytes")],
        *[_by_strategy(facts, "train_loss", main, over) for over in ("rounds", "bytes")],
        _by_type(facts, test, main),
    ]
    if not (found := charts(*drawn)):
        return Section("curves", "Curves", how, missing="No round has been finished yet.")
    return Section("curves", "Curves", how, [*found, *_curve_table(facts, test, main)])


def measure_title(measure: str) -> str:
    """``personal_accuracy`` -> ``accuracy on own tests``."""
    scope, _, name = measure.partition("_")
    what = MEASURE_NAMES.get(name, name.replace("_", " "))
    where = {"train": "in training", "global": "on the common test", "personal": "on own tests"}
    return f"{what} {where.get(scope, '')}".strip()


def points(group: Sequence[Curve], over: str) -> list[tuple[float, float]]:
    """Return the mean over seeds at each round; over bytes only where every seed tells them."""
    at: dict[int, list[tuple[float | None, float]]] = {}
    for curve in group:
        for index, place in enumerate(curve.rounds):
            moved = curve.bytes[index] if index < len(curve.bytes) else None
            at.setdefault(place, []).append((moved, curve.values[index]))
    line = []
    for place, found in sorted(at.items()):
        known = [value for value, _ in found if value is not None]
        if over == "bytes" and len(known) < len(found):
            continue
        x = statistics.fmean(known) if over == "bytes" else float(place)
        line.append((x, statistics.fmean(value for _, value in found)))
    return line


def axes(measure: str, over: str) -> tuple[Axis, Axis]:
    """Axes of a curve over ``rounds`` or ``bytes``."""
    x = (
        Axis("bytes of training so far, up and down", "bytes", 0.0)
        if over == "bytes"
        else Axis("round", "count", 0.0)
    )
    return x, Axis(measure_title(measure), unit_of(measure.partition("_")[2]))


def _strategies(facts: RunFacts, measure: str) -> dict[str, list[Curve]]:
    """Every strategy's curves of a measure over all clients, seed by seed."""
    groups: dict[str, list[Curve]] = {}
    for curve in facts.curves:
        if curve.measure == measure and curve.type_key == ALL_TYPES:
            groups.setdefault(curve.strategy, []).append(curve)
    return groups


def _by_strategy(facts: RunFacts, measure: str, main: Lead, over: str) -> LineChart:
    lines = [
        Line(title_of(facts, strategy), points(group, over), style_of(facts, strategy))
        for strategy, group in _strategies(facts, measure).items()
    ]
    x, y = axes(measure, over)
    title = f"{measure_title(measure)} over {over}, by strategy"
    marks = _phase(facts, main) if over == "rounds" else []
    return LineChart(title[0].upper() + title[1:], x, y, lines[:MOST_LINES], marks)


def _phase(facts: RunFacts, main: Lead) -> list[tuple[float, str]]:
    starts = [
        one.personalized_from
        for one in facts.runs
        if one.strategy == main.strategy and one.personalized_from
    ]
    return [(float(starts[0]), "types go their own ways from here")] if starts else []


def _by_type(facts: RunFacts, measure: str, main: Lead) -> LineChart:
    groups: dict[str, list[Curve]] = {}
    for curve in facts.curves:
        if (curve.measure, curve.strategy) == (
            measure,
            main.strategy,
        ) and curve.type_key != ALL_TYPES:
            groups.setdefault(curve.type_key, []).append(curve)
    lines = [
        Line(key, points(group, "rounds"), index)
        for index, (key, group) in enumerate(sorted(groups.items()))
    ]
    x, y = axes(measure, "rounds")
    return LineChart(
        f"{main.title}: {measure_title(measure)} over rounds, by type",
        x,
        y,
        lines[:MOST_LINES],
        _phase(facts, main),
    )


def _curve_table(facts: RunFacts, measure: str, main: Lead) -> list[Block]:
    groups = _strategies(facts, measure)
    if not groups:
        return []
    lines: list[list[Cell | str]] = []
    sign = -1 if main.measure == "loss" else 1
    for strategy, group in groups.items():
        found = points(group, "rounds")
        best = max(found, key=lambda point: sign * point[1])
        moved = points(group, "bytes")
        lines.append([
            title_of(facts, strategy), number(found[0][1], main.unit), number(found[-1][1], main.unit),
            f"{number(best[1], main.unit)} (round {best[0]:.0f})", told(moved[-1][0], "bytes") if moved else "–",
        ])  # fmt: skip
    heads = ["strategy", "first test", "last test", "best test", "bytes by then"]
    title = measure_title(measure)
    shown = (heads, lines, title[0].upper() + title[1:], frozenset({1, 2, 3, 4}), "table-curves")
    return [Table(*shown, note=two_untouched(facts))]


def alignment(facts: RunFacts) -> Section:
    """How well types understand each other."""
    how = (
        "Each number says how alike a type's model and the others see the same public texts there: "
        "1 is the same, 0 nothing in common; below the threshold a type shares nothing there."
    )
    if not facts.alignment:
        return Section(
            "alignment",
            "Alignment",
            how,
            missing="No strategy of this run aligned types, or alignment has not happened yet.",
        )
    cells: dict[tuple[str, str], list[Alignment]] = {}
    for one in facts.alignment:
        cells.setdefault((one.type_key, one.place), []).append(one)
    lines: list[list[Cell | str]] = []
    for (key, place), group in cells.items():
        shared = {True: "yes", False: "no", None: "not told"}[group[-1].shared]
        threshold = next((one.threshold for one in group if one.threshold is not None), None)
        lines.append([Cell(key), place, told(_quality(group), "number"), "–" if threshold is None else f"{threshold:g}",
                      Cell(shared, "bad" if shared == "no" else "")])  # fmt: skip
    heads = ["type", "place", "held-out correlation", "threshold", "shares"]
    table = Table(heads, lines, "", frozenset({2, 3}), "table-alignment")
    places = list(dict.fromkeys(place for _, place in cells))
    groups = [
        BarGroup(place, [Bar(key, _quality(group), index) for index, ((key, at), group) in enumerate(
            item for item in cells.items() if item[0][1] == place)])
        for place in places
    ]  # fmt: skip
    chart = BarChart(
        "Alignment by place and type",
        Axis("held-out canonical correlation", "number", 0.0, 1.0),
        groups,
    )
    return Section("alignment", "Alignment", how, [table, *charts(chart)])


def _quality(group: Sequence[Alignment]) -> float:
    return statistics.fmean(one.quality for one in group)
