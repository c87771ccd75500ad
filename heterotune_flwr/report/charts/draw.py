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
from heterotune_flwr.report.charts.svg import NARROW, WIDTH


def draw(chart: Chart, narrow: bool = False) -> Markup:
    """A chart as inline SVG, whose colours are the page's (classes ``s0`` .. ``s7``, ``grid``, ``tick``, ...).

    ``narrow``: dots and bars for a row of three.
    """
    width = NARROW if narrow else WIDTH
    match chart:
        case LineChart():
            return lines(chart)
        case DotChart():
            return dots(chart, width)
        case BarChart():
            return bars(chart, width)
        case StackChart():
            return stacks(chart)
        case HeatChart():
            return heat(chart)
