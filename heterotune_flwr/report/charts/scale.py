"""From values to places: round ticks, and linear scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heterotune_flwr.report.charts.kinds import Axis, Unit

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A straight line from values to places, ends included."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside is put at the near end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ends(axis: Axis, values: Iterable[float], wanted: int = 4) -> tuple[float, float]:
    """Lowest and highest value an axis shows: its own ends, else round numbers around all values.

    Nothing below 0, or above 100 %, is shown that no value reaches: equal values stand near the middle, or at the edge.
    """
    finite = [value for value in values if math.isfinite(value)]
    low = axis.low if axis.low is not None else min(finite, default=0.0)
    high = axis.high if axis.high is not None else max(finite, default=1.0)
    if high <= low:
        around = abs(low) / 10 or (0.05 if axis.unit == "share" else 0.5)
        low, high = (low - around, low + around) if axis.low is None else (low, low + 1.0)
    step = _step(high - low, wanted)
    if axis.low is None:
        low = math.floor(low / step + 1e-9) * step
    if axis.high is None:
        high = math.ceil(high / step - 1e-9) * step
    if axis.low is None and min(finite, default=0.0) >= 0:
        low = max(low, 0.0)
    if axis.high is None and axis.unit == "share" and max(finite, default=0.0) <= 1:
        high = min(high, 1.0)
    return low, high


def ticks(low: float, high: float, unit: Unit = "number", wanted: int = 4) -> list[float]:
    """About as many round numbers as wanted, from low to high; whole ones of what is counted."""
    step = _step(high - low, wanted)
    if unit == "count":
        step = max(round(step), 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _step(length: float, wanted: int) -> float:
    rough = length / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return min((power * step for step in _STEPS), key=lambda step: abs(step - rough))


def tick_text(value: float, unit: Unit, places: Sequence[float]) -> str:
    """A tick's number, as short as its neighbours allow."""
    if unit == "share":
        return f"{100 * value:g} %"
    if unit == "points":
        return f"{100 * value:+g}".replace("-", "\u2212")
    if unit == "bytes":
        largest = max(abs(place) for place in places)
        power = min(int(math.log10(largest) // 3), 4) if largest >= 1 else 0
        return f"{value / 1000**power:g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if value else "0"
    if unit == "seconds":
        return f"{value:g} s" if value else "0"
    return f"{value:g}".replace("-", "\u2212")


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in their order, at least ``gap`` apart, between low and high if there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    previous = low - gap
    for index in order:
        previous = placed[index] = max(wanted[index], previous + gap)
    following = high + gap
    for index in reversed(order):
        following = placed[index] = min(placed[index], following - gap)
    return placed
