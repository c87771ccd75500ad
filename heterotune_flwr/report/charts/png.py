"""The page's charts as PNG files for papers, drawn by matplotlib (extra ``plots``) from the same data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.names import safe_text
from heterotune_flwr.report.charts.kinds import (
    Axis,
    BarChart,
    Chart,
    DotChart,
    HeatChart,
    LineChart,
    StackChart,
    told,
)
from heterotune_flwr.report.charts.scale import ends, tick_text
from heterotune_flwr.report.charts.svg import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis

#: The page's colours on paper, with the figures and dashes that go with them.
_COLOURS = ("#0072b2", "#c8500a", "#007f5f", "#74777d", "#a87400", "#a8467f", "#3690c4", "#1b1c1f")
_MARKERS = "os^Dv_|x"
_DASHES: tuple[Any, ...] = ("-", (0, (7, 4)), (0, (2, 4)), "-.", "-", (0, (5, 2)), ":", "-")
_LETTERS = 60


def write_png(chart: Chart, path: Path, dpi: int = 300) -> None:
    """Draw a chart into a file (ConfigError: matplotlib is missing)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"PNG files need matplotlib ({error}): pip install 'heterotune-flwr[plots]'"
        ) from error
    figure = Figure(figsize=(4.6, _height(chart)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    match chart:
        case LineChart():
            _lines(chart, axes)
        case DotChart():
            _dots(chart, axes)
        case BarChart():
            _bars(chart, axes)
        case StackChart():
            _stacks(chart, axes)
        case HeatChart():
            _heat(chart, axes)
    figure.savefig(path, dpi=dpi)


def _height(chart: Chart) -> float:
    match chart:
        case DotChart() | StackChart():
            return 1.1 + 0.42 * len(chart.rows)
        case BarChart():
            return 0.9 + 0.34 * sum(len(group.bars) for group in chart.groups)
        case HeatChart():
            return 1.6 + 0.24 * len(chart.rows)
    return 3.0


def _text(words: str) -> str:
    """Somebody's words for matplotlib, which would read formulas between dollars."""
    return safe_text(words, _LETTERS).replace("$", r"\$")


def _label(place: DrawnAxis, axis: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    place.set_label_text(_text(axis.label))
    place.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=axis.unit == "count"))
    furthest = max(map(abs, place.get_view_interval()))
    place.set_major_formatter(
        FuncFormatter(lambda value, _: tick_text(value, axis.unit, [furthest]))
    )


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower center", fontsize=7, ncols=2, frameon=False)


def _lines(chart: LineChart, axes: Axes) -> None:
    for line in chart.lines:
        style = line.style % STYLES
        axes.plot(
            [x for x, _ in line.points], [y for _, y in line.points], color=_COLOURS[style], linestyle=_DASHES[style],
            marker=_MARKERS[style], markersize=4, markevery=max(1, len(line.points) // 8), label=_text(line.name),
        )  # fmt: skip
    for place, word in chart.marks:
        axes.axvline(place, color="#74777d", linewidth=0.8, linestyle=":")
        axes.annotate(
            _text(word),
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            va="bottom",
            ha="center",
        )
    axes.set_ylim(*ends(chart.y, [y for line in chart.lines for _, y in line.points]))
    _label(axes.xaxis, chart.x)
    _label(axes.yaxis, chart.y)
    _legend(axes)


def _dots(chart: DotChart, axes: Axes) -> None:
    for number, row in enumerate(chart.rows):
        values = [dot.value for dot in row.dots]
        style = row.style % STYLES
        axes.plot(
            values,
            [number] * len(values),
            linestyle="",
            marker=_MARKERS[style],
            color=_COLOURS[style],
            alpha=0.6,
        )
        if row.mean is not None:
            axes.plot([row.mean] * 2, [number - 0.3, number + 0.3], color="#1b1c1f", linewidth=2)
        if row.worst is not None:
            axes.plot([row.worst], [number + 0.34], marker="^", color="#1b1c1f", markersize=5)
    _rows(axes, [row.name for row in chart.rows])
    axes.set_xlim(chart.x.low, chart.x.high)
    _label(axes.xaxis, chart.x)


def _bars(chart: BarChart, axes: Axes) -> None:
    every = [
        (f"{group.name}: {bar.name}" if len(chart.groups) > 1 else bar.name, bar)
        for group in chart.groups
        for bar in group.bars
    ]
    for number, (_, bar) in enumerate(every):
        axes.barh(number, bar.value, 0.6, color=_COLOURS[bar.style % STYLES], xerr=bar.spread)
        axes.annotate(
            f" {told(bar.value, chart.x.unit)}", (bar.value, number), fontsize=8, va="center"
        )
    _rows(axes, [name for name, _ in every])
    axes.margins(x=0.15)
    _label(axes.xaxis, chart.x)


def _stacks(chart: StackChart, axes: Axes) -> None:
    for number, (_, values) in enumerate(chart.rows):
        whole = sum(values) if chart.whole else 1.0
        start = 0.0
        for part, value in enumerate(values):
            share = value / whole if whole and math.isfinite(value) else 0.0
            axes.barh(number, share, 0.6, left=start, color=_COLOURS[part % STYLES],
                      label=_text(chart.parts[part]) if not number else None)  # fmt: skip
            start += share
    _rows(axes, [name for name, _ in chart.rows])
    _label(axes.xaxis, Axis("", "share" if chart.whole else chart.unit))
    _legend(axes)


def _heat(chart: HeatChart, axes: Axes) -> None:
    from matplotlib.colors import Normalize, PowerNorm

    values = [[math.nan if value is None else value for value in row] for row in chart.values]
    norms = {"cosine": Normalize(-1, 1), "share": PowerNorm(0.5, 0, 1)}  # small shares are seen too
    colours = "RdBu" if chart.unit == "cosine" else "Blues"
    norm = norms.get(chart.unit, Normalize(0))
    shown = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    names = [_text(name) for name in chart.columns]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(chart.rows)), [_text(name) for name in chart.rows], fontsize=7)
    axes.set_xlabel(_text(chart.column_label))
    axes.set_ylabel(_text(chart.row_label))
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)


def _rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_text(name) for name in names], fontsize=8)
    axes.invert_yaxis()
