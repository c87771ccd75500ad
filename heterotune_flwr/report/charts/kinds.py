"""What a chart shows, as plain data: two ways of drawing read the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["number", "share", "points", "bytes", "seconds", "count", "cosine", "nats"]


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: what it is called, what it counts, and ends it must have."""

    label: str
    unit: Unit = "number"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A named row of points (x, y); ``style`` chooses colour, dash and marker: the same for the same subject."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclass(frozen=True)
class LineChart:
    """Several lines over one axis; ``marks`` are moments on it, with a word for each."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Dot:
    """One value on a row of dots, and whose it is."""

    value: float
    name: str = ""


@dataclass(frozen=True)
class DotRow:
    """Values of one kind: single dots, their mean, and the mean of the worst tenth."""

    name: str
    dots: Sequence[Dot]
    mean: float | None = None
    worst: float | None = None
    style: int = 0


@dataclass(frozen=True)
class DotChart:
    """Rows of dots over one axis: how far values lie apart."""

    title: str
    x: Axis
    rows: Sequence[DotRow]


@dataclass(frozen=True)
class Bar:
    """One bar; ``spread`` is drawn to both sides of its end."""

    name: str
    value: float
    style: int = 0
    spread: float | None = None


@dataclass(frozen=True)
class BarGroup:
    """Bars that belong together; a group without a name has no heading."""

    name: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class BarChart:
    """Groups of bars over one axis."""

    title: str
    x: Axis
    groups: Sequence[BarGroup]


@dataclass(frozen=True)
class StackChart:
    """Rows of one bar each, cut into parts; ``whole``: every row is drawn as shares of its own sum."""

    title: str
    unit: Unit
    parts: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    whole: bool = False


@dataclass(frozen=True)
class HeatChart:
    """A table whose cells are shaded: ``values[row][column]``, None where there is nothing.

    Shares are shaded from 0 to 1, cosines from -1 to 1 in two hues, others from 0 to the largest.
    """

    title: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: Unit = "share"


Chart = LineChart | DotChart | BarChart | StackChart | HeatChart


def is_empty(chart: Chart) -> bool:
    """Whether there is nothing in a chart to draw."""
    match chart:
        case LineChart():
            return not any(line.points for line in chart.lines)
        case DotChart():
            return not any(row.dots for row in chart.rows)
        case BarChart():
            return not any(group.bars for group in chart.groups)
        case StackChart():
            return not any(any(values) for _, values in chart.rows)
        case HeatChart():
            return not any(value is not None for row in chart.values for value in row)


def told(value: float, unit: Unit) -> str:
    """A value as people write it, unbroken: ``0.565`` as a share is ``56.5 %``, ``34640`` bytes are ``34.6 kB``."""
    if not math.isfinite(value):
        return "–"
    return _written(value, unit).replace("-", "\u2212").replace(" ", "\u00a0")


def _written(value: float, unit: Unit) -> str:
    if abs(value) >= 1e18:  # of a damaged file
        return f"{value:.2g}"
    match unit:
        case "share":
            return f"{100 * value:.1f} %"
        case "points":
            return f"{100 * value:+.1f}" if round(1000 * value) else "0.0"
        case "cosine":
            return f"{value:+.2f}"
        case "nats":
            return f"{value:.2f}"
        case "bytes":
            return _scaled(value, ("B", "kB", "MB", "GB", "TB"))
        case "seconds":
            return _duration(value)
        case "count":
            return _grouped(value)
    return _grouped(value) if abs(value) >= 1000 else f"{value:.3g}"


def _grouped(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def _scaled(value: float, names: Sequence[str]) -> str:
    for name in names[:-1]:
        if abs(value) < 1000:
            return f"{value:.0f} {name}" if name == names[0] else f"{value:.1f} {name}"
        value /= 1000
    return f"{value:.1f} {names[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
