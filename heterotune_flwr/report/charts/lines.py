"""A chart of lines over rounds or bytes, each named at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from heterotune_flwr.report.charts.kinds import Line, LineChart, told
from heterotune_flwr.report.charts.scale import Scale, apart, ends, tick_text, ticks
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

_HEIGHT = 236.0
_TOP, _BOTTOM, _LEFT = 26.0, 40.0, 44.0
#: Markers of a line that has more points stand at some of them.
_MARKERS = 8


def lines(chart: LineChart) -> Markup:
    """Draw a chart of lines; points that are no numbers are gaps."""
    names = max((len(one.name) for one in chart.lines), default=0)
    right = min(24 + LETTER * names, 132.0)
    xs = [x for one in chart.lines for x, _ in one.points]
    ys = [y for one in chart.lines for _, y in one.points if math.isfinite(y)]
    x = Scale(*ends(chart.x, xs), _LEFT, WIDTH - right)
    y = Scale(*ends(chart.y, ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(chart, x, y), *_moments(chart, x)]
    parts += [_line(one, x, y, chart) for one in chart.lines]
    parts += _names(chart.lines, x, y, right)
    return drawing("lines", chart.title, _HEIGHT, parts)


def _frame(chart: LineChart, x: Scale, y: Scale) -> list[Markup]:
    parts = [text(0.0, 11.0, clipped(chart.y.label, WIDTH), "label")]
    levels = ticks(y.low, y.high)
    for level in levels:
        parts.append(line(x.start, y(level), x.end, y(level), "grid"))
        parts.append(
            text(
                x.start - 6, y(level) + 4, tick_text(level, chart.y.unit, levels), "tick", end=True
            )
        )
    places = ticks(x.low, x.high)
    for place in places:
        parts.append(line(x(place), y.start, x(place), y.start + 4, "axis"))
        parts.append(middle(x(place), y.start + 16, tick_text(place, chart.x.unit, places), "tick"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    label = clipped(chart.x.label, WIDTH - x.start)
    parts.append(text(x.start, _HEIGHT - 6, label, "label"))
    return parts


def _moments(chart: LineChart, x: Scale) -> list[Markup]:
    parts = []
    for place, word in chart.marks:
        at = x(place)
        left = at > (x.start + x.end) / 2
        parts.append(line(at, _TOP - 8, at, _HEIGHT - _BOTTOM, "moment"))
        shown = clipped(word, (at - x.start) if left else (WIDTH - at))
        parts.append(text(at - 4 if left else at + 4, _TOP - 2, shown, "note", end=left))
    return parts


def _line(one: Line, x: Scale, y: Scale, chart: LineChart) -> Markup:
    style = one.style % STYLES
    parts, pieces, piece = [], [], list[str]()
    good = [(px, py) for px, py in one.points if math.isfinite(py)]
    for px, py in one.points:
        if math.isfinite(py):
            piece.append(f"{x(px):.1f},{y(py):.1f}")
        elif piece:
            pieces.append(piece)
            piece = []
    parts += [
        element("polyline", points=" ".join(found), class_=f"line s{style}")
        for found in (*pieces, piece)
        if len(found) > 1
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


def _names(shown: Sequence[Line], x: Scale, y: Scale, right: float) -> list[Markup]:
    last = [
        (one, [point for point in one.points if math.isfinite(point[1])][-1])
        for one in shown
        if any(math.isfinite(py) for _, py in one.points)
    ]
    places = apart([y(point[1]) for _, point in last], LINE - 1, _TOP - 4, y.start)
    parts = []
    for (one, (px, py)), place in zip(last, places, strict=True):
        if abs(place - y(py)) > 2 or x.end - x(px) > 2:
            parts.append(line(x(px) + 4, y(py), x.end + 9, place, "lead"))
        parts.append(text(x.end + 11, place + 4, clipped(one.name, right - 10), "name"))
    return parts
