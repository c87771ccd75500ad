"""A chart of lines over rounds or bytes, each named at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from markupsafe import Markup

from heterotune_flwr.report.charts.kinds import Line, LineChart, told
from heterotune_flwr.report.charts.scale import Scale, apart, ends, tick_text, ticks
from heterotune_flwr.report.charts.svg import (
    LETTER,
    LINE,
    STYLES,
    TICK_LETTER,
    WIDTH,
    clipped,
    drawing,
    element,
    line,
    marker,
    middle,
    text,
)

_HEIGHT = 236.0
_TOP, _BOTTOM, _LEFT = 26.0, 40.0, 44.0
#: Markers of a line that has more points stand at some of them.
_MARKERS = 8


def lines(chart: LineChart) -> Markup:
    """Draw a chart of lines; points that are no numbers are gaps."""
    names = max((len(one.name) for one in chart.lines), default=0)
    right = min(24 + LETTER * names, 132.0)
    xs = [x for one in chart.lines for x, _ in one.points]
    ys = [y for one in chart.lines for _, y in one.points]
    far = replace(chart.x, high=chart.x.high or max(xs, default=1.0))
    y = Scale(*ends(chart.y, ys), _HEIGHT - _BOTTOM, _TOP)
    levels = ticks(y.low, y.high, chart.y.unit)
    numbers = {level: tick_text(level, chart.y.unit, levels) for level in levels}
    left = max(_LEFT, 10 + TICK_LETTER * max(map(len, numbers.values()), default=0))
    x = Scale(*ends(far, xs), min(left, WIDTH / 2), WIDTH - right)
    parts = [*_frame(chart, x, y, numbers), *_moments(chart, x)]
    parts += [_line(one, x, y, chart) for one in chart.lines]
    parts += _names(chart.lines, x, y, right)
    return drawing("lines", chart.title, _HEIGHT, parts)


def _frame(chart: LineChart, x: Scale, y: Scale, numbers: Mapping[float, str]) -> list[Markup]:
    """Grid lines with their ``numbers``, the axis below, and what both count."""
    parts = [text(0.0, 11.0, clipped(chart.y.label, WIDTH), "label")]
    for level, number in numbers.items():
        parts.append(line(x.start, y(level), x.end, y(level), "grid"))
        parts.append(text(x.start - 6, y(level) + 4, number, "tick", end=True))
    places = ticks(x.low, x.high, chart.x.unit)
    for place in places:
        parts.append(line(x(place), y.start, x(place), y.start + 4, "axis"))
        parts.append(middle(x(place), y.start + 16, tick_text(place, chart.x.unit, places), "tick"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    label = clipped(chart.x.label, WIDTH - x.start)
    parts.append(text(x.start, _HEIGHT - 6, label, "label"))
    return parts


def _moments(chart: LineChart, x: Scale) -> list[Markup]:
    """Upright dotted lines; what the first one is stands below the axis, where nothing else is."""
    parts = [
        line(x(place), _TOP - 4, x(place), _HEIGHT - _BOTTOM, "moment") for place, _ in chart.marks
    ]
    for _, word in chart.marks[:1]:
        shown = clipped(word, WIDTH - x.start - LETTER * (len(chart.x.label) + 4))
        start = x.start + LETTER * (len(chart.x.label) + 3)
        parts.append(line(start, _HEIGHT - 15, start, _HEIGHT - 4, "moment"))
        parts.append(text(start + 5, _HEIGHT - 6, shown, "note"))
    return parts


def _line(one: Line, x: Scale, y: Scale, chart: LineChart) -> Markup:
    style = one.style % STYLES
    good = _numbers(one.points)
    pieces = [
        [f"{x(px):.1f},{y(py):.1f}" for px, py in piece]
        for is_number, piece in groupby(one.points, lambda point: math.isfinite(point[1]))
        if is_number
    ]
    parts = [
        element("polyline", points=" ".join(piece), class_=f"line s{style}")
        for piece in pieces
        if len(piece) > 1
    ]
    every = max(1, math.ceil(len(good) / _MARKERS))
    last = len(good) - 1
    parts += [
        marker(x(px), y(py), style, 3.4)
        for index, (px, py) in enumerate(good)
        if (last - index) % every == 0
    ]
    ended = f": {told(good[-1][1], chart.y.unit)} at the end" if good else ""
    return element("g", element("title", f"{clipped(one.name, 600)}{ended}"), *parts)


def _numbers(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _room(name: str) -> float:
    """What a name needs beside its point, on a line that ends before the others."""
    return min(max(10 + LETTER * len(name), 70.0), 140.0)


def _names(shown: Sequence[Line], x: Scale, y: Scale, right: float) -> list[Markup]:
    """A name beside each line's last point; of lines that end at the right in a column, apart from each other."""
    ends_at = [
        (one.name, x(good[-1][0]), y(good[-1][1]))
        for one in shown
        if (good := _numbers(one.points))
    ]
    early = [found for found in ends_at if found[1] < x.end - _room(found[0])]
    late = [found for found in ends_at if found not in early]
    parts = []
    beside = apart([py for _, _, py in early], LINE - 1, _TOP - 4, y.start)
    for (name, px, _), place in zip(early, beside, strict=True):
        parts.append(text(px + 6, place - 5, clipped(name, x.end - px), "name"))
    column = apart([py for _, _, py in late], LINE - 1, _TOP - 4, y.start)
    for (name, px, py), place in zip(late, column, strict=True):
        if abs(place - py) > 2 or x.end - px > 2:
            parts.append(line(px + 4, py, x.end + 9, place, "lead"))
        parts.append(text(x.end + 11, place + 4, clipped(name, right - 10), "name"))
    return parts
