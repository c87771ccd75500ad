"""Charts whose rows lie below each other: dots, bars, stacks. Names stand above their row, so they may be long."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from heterotune_flwr.report.charts.kinds import (
    Axis,
    Bar,
    BarChart,
    Dot,
    DotChart,
    DotRow,
    StackChart,
    told,
)
from heterotune_flwr.report.charts.scale import Scale, ends, tick_text, ticks
from heterotune_flwr.report.charts.svg import (
    LETTER,
    LINE,
    STYLES,
    WIDTH,
    clipped,
    drawing,
    element,
    line,
    marker,
    middle,
    text,
)

_INSET = 14.0
#: Beyond this many dots in a row they are drawn fainter and smaller.
_CROWD = 60


def dots(chart: DotChart, width: float = WIDTH) -> Markup:
    """Draw rows of dots: a dot per value, a bar at the mean, a wedge below at the mean of the worst tenth."""
    values = [dot.value for row in chart.rows for dot in row.dots]
    x = Scale(*ends(chart.x, values), _INSET, width - _INSET)
    height = 46.0
    bottom = height * len(chart.rows)
    parts = _scale(chart.x, x, 4.0, bottom, width)
    for number, row in enumerate(chart.rows):
        parts += _dot_row(row, x, height * number, chart.x, width)
    return drawing("dots", chart.title, bottom + 38, parts, width)


def _dot_row(row: DotRow, x: Scale, top: float, axis: Axis, width: float) -> list[Markup]:
    facts = "" if row.mean is None else told(row.mean, axis.unit)
    parts = _named(row.name, facts, top + 12, width)
    crowd = len(row.dots) > _CROWD
    for dot, offset in zip(row.dots, _beeswarm(row.dots, x, 2.2 if crowd else 5.0), strict=True):
        shown = marker(x(dot.value), top + 29 + offset, row.style, 2.2 if crowd else 3.6)
        title = element("title", f"{clipped(dot.name, 600)}: {told(dot.value, axis.unit)}")
        parts.append(element("g", title, shown, class_="dot"))
    if row.mean is not None:
        parts.append(line(x(row.mean), top + 18, x(row.mean), top + 40, "mean"))
    if row.worst is not None:
        parts.append(_wedge(x(row.worst), top + 38))
    return parts


def _beeswarm(shown: Sequence[Dot], x: Scale, size: float) -> list[float]:
    """How far above or below the middle each dot lies, so that equal ones do not hide each other."""
    taken: dict[int, int] = {}
    offsets = []
    for dot in shown:
        column = round(x(dot.value) / size)
        count = taken[column] = taken.get(column, -1) + 1
        offsets.append((count + 1) // 2 * (-1) ** count * min(size, 18 / max(len(shown), 1) + 1.2))
    return [max(-9.0, min(9.0, offset)) for offset in offsets]


def _wedge(x: float, y: float) -> Markup:
    return element(
        "polygon",
        points=f"{x:.1f},{y:.1f} {x - 4:.1f},{y + 6:.1f} {x + 4:.1f},{y + 6:.1f}",
        class_="worst",
    )


def bars(chart: BarChart, width: float = WIDTH) -> Markup:
    """Draw groups of bars, each with its name above and its value at the right."""
    every = [bar for group in chart.groups for bar in group.bars]
    values = [bar.value + sign * (bar.spread or 0.0) for bar in every for sign in (-1, 1)]
    x = Scale(*ends(chart.x, [0.0, *values]), 0.5, width - 0.5)
    parts: list[Markup] = []
    y = 0.0
    for group in chart.groups:
        if group.name:
            parts.append(text(0.0, y + 14, clipped(group.name, width), "group"))
            y += 20
        for bar in group.bars:
            parts += _bar(bar, x, y, chart.x, width)
            y += 31
        y += 6
    return drawing("bars", chart.title, y + 34, [*_scale(chart.x, x, 4.0, y, width), *parts], width)


def _bar(bar: Bar, x: Scale, top: float, axis: Axis, width: float) -> list[Markup]:
    value = told(bar.value, axis.unit)
    zero, end = x(0.0), x(bar.value)
    class_ = f"bar s{bar.style % STYLES}"
    parts = [
        marker(5.0, top + 9, bar.style, 3.6),
        *_named(bar.name, value, top + 13, width, 14.0),
        element("rect", x=0.0, y=top + 18, width=width, height=9.0, class_="track"),
        element(
            "rect",
            x=min(zero, end),
            y=top + 18,
            width=max(abs(end - zero), 0.8),
            height=9.0,
            class_=class_,
        ),
    ]
    if bar.spread:
        low, high = x(bar.value - bar.spread), x(bar.value + bar.spread)
        parts.append(line(low, top + 22.5, high, top + 22.5, "spread"))
        parts += [line(place, top + 19, place, top + 26, "spread") for place in (low, high)]
    return parts


def _named(name: str, value: str, y: float, width: float, start: float = 0.0) -> list[Markup]:
    """A row's name from ``start`` on, cut before its value, which ends at the right."""
    room = width - start - LETTER * (len(value) + 2)
    return [
        text(start, y, clipped(name, room), "name"),
        text(width, y, value, "value", end=True),
    ]


def _scale(axis: Axis, x: Scale, top: float, bottom: float, width: float) -> list[Markup]:
    """Grid lines with their numbers below, and what they count."""
    parts = []
    places = ticks(x.low, x.high, axis.unit)
    for place in places:
        words = tick_text(place, axis.unit, places)
        half = LETTER * len(words) / 2
        parts.append(line(x(place), top, x(place), bottom + 3, "grid"))
        parts.append(middle(min(max(x(place), half), width - half), bottom + 16, words, "tick"))
    parts.append(text(0.0, bottom + 32, clipped(axis.label, width), "label"))
    return parts


def stacks(chart: StackChart) -> Markup:
    """Draw rows of one bar each, cut into parts; what each colour is stands above."""
    sums = [sum(values) for _, values in chart.rows]
    longest = max(sums, default=0.0) or 1.0
    key, y = _key(chart.parts)
    parts = list(key)
    y += 6
    for (name, values), total in zip(chart.rows, sums, strict=True):
        shown = told(total, chart.unit)
        parts += _named(name, shown, y + 12, WIDTH)
        parts += _cut(chart, values, total if chart.whole else longest, y + 17)
        y += 37
    return drawing("stacks", chart.title, y, parts)


def _cut(chart: StackChart, values: Sequence[float], most: float, top: float) -> list[Markup]:
    parts, start = [], 0.0
    for number, (part, value) in enumerate(zip(chart.parts, values, strict=True)):
        width = WIDTH * value / most if most and math.isfinite(value) else 0.0
        if width > 0:
            title = element("title", f"{clipped(part, 600)}: {told(value, chart.unit)}")
            class_ = f"bar s{number % STYLES}"
            box = element(
                "rect", title, x=start, y=top, width=max(width - 1, 0.6), height=13.0, class_=class_
            )
            parts.append(box)
        start += width
    return parts


def _key(names: Sequence[str]) -> tuple[list[Markup], float]:
    """Names with their colours and figures in lines, and how high they are."""
    parts, x, y = [], 0.0, 4.0
    for number, name in enumerate(names):
        shown = clipped(name, WIDTH - 20)
        width = 26 + LETTER * len(shown)
        if x and x + width > WIDTH:
            x, y = 0.0, y + LINE + 2
        parts += [marker(x + 6, y + 6, number, 4.4), text(x + 15, y + 10, shown, "name")]
        x += width
    return parts, y + LINE
