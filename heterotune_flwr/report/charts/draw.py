"""One door to all drawings."""

from __future__ import annotations

from markupsafe import Markup

from heterotune_flwr.report.charts.heat import heat
from heterotune_flwr.report.charts.kinds import (
    BarChart,
    Chart,
    DotChart,
    HeatChart,
    LineChart,
    StackChart,
)
from heterotune_flwr.report.charts.lines import lines
from heterotune_flwr.report.charts.rows import bars, dots, stacks


def draw(chart: Chart) -> Markup:
    """A chart as inline SVG, whose colours are the page's (classes ``s0`` .. ``s7``, ``grid``, ``tick``, ...)."""
    match chart:
        case LineChart():
            return lines(chart)
        case DotChart():
            return dots(chart)
        case BarChart():
            return bars(chart)
        case StackChart():
            return stacks(chart)
        case HeatChart():
            return heat(chart)
