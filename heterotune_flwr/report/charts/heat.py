"""A shaded table: confusion, label mix, agreement between types."""

from __future__ import annotations

import math

from markupsafe import Markup

from heterotune_flwr.report.charts.kinds import HeatChart, told
from heterotune_flwr.report.charts.svg import LETTER, WIDTH, clipped, drawing, element, middle, text

#: Cells at least this wide have room for their number.
_ROOMY = 27.0
#: Darkest shade: letters on it can still be read.
_DARKEST = 0.5


def heat(chart: HeatChart) -> Markup:
    """Draw a shaded table; columns are named along their top, upright."""
    longest = max((len(name) for name in chart.rows), default=0)
    left = min(max(8 + LETTER * longest, 60.0), 118.0)
    size = min((WIDTH - left) / max(len(chart.columns), 1), 56.0)
    tall = min(max(size, 16.0), 26.0)
    head = min(14 + LETTER * max((len(name) for name in chart.columns), default=0), 112.0)
    top = head + 18
    parts = [text(left, 11.0, clipped(f"{chart.column_label} →", WIDTH - left), "label")]
    parts.append(text(0.0, top - 6, clipped(f"{chart.row_label} ↓", left), "label"))
    for number, name in enumerate(chart.columns):
        x, y = left + size * (number + 0.5) + 4, top - 6
        words = clipped(name, head - 8)
        parts.append(text(x, y, words, "tick", transform=f"rotate(-90 {x:.1f} {y:.1f})"))
    most = _most(chart)
    for row, name in enumerate(chart.rows):
        y = top + tall * row
        parts.append(text(left - 6, y + tall / 2 + 4, clipped(name, left - 8), "tick", end=True))
        for column, value in enumerate(chart.values[row]):
            x = left + size * column
            where = f"{clipped(name, 600)}, {clipped(chart.columns[column], 600)}"
            parts.append(_cell(chart, value, most, (x, y, size, tall), where))
    return drawing("heat", chart.title, top + tall * len(chart.rows) + 4, parts)


def _most(chart: HeatChart) -> float:
    if chart.unit in ("share", "cosine"):
        return 1.0
    return max((abs(v) for row in chart.values for v in row if v is not None), default=1.0) or 1.0


def _cell(
    chart: HeatChart,
    value: float | None,
    most: float,
    box: tuple[float, float, float, float],
    where: str,
) -> Markup:
    x, y, width, height = box
    if value is None:
        return element(
            "rect", x=x, y=y, width=width - 1.5, height=height - 1.5, class_="cell nothing"
        )
    shade = _DARKEST * math.sqrt(min(abs(value) / most, 1.0))  # small shares are seen too
    class_ = "cell against" if value < 0 else "cell"
    words = told(value, chart.unit)
    children = [
        element("title", f"{where}: {words}"),
        element(
            "rect",
            x=x,
            y=y,
            width=width - 1.5,
            height=height - 1.5,
            class_=class_,
            fill_opacity=f"{shade:.2f}",
        ),
    ]
    number = words.removesuffix("\u00a0%").removesuffix(".0")
    if width >= _ROOMY and (value or chart.unit == "cosine"):
        children.append(middle(x + width / 2, y + height / 2 + 4, number, "number"))
    return element("g", *children, class_="cellbox")
