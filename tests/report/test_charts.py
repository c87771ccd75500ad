"""Charts say what their data say: as SVG and as PNG."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from heterotune_flwr.report.charts.draw import draw
from heterotune_flwr.report.charts.kinds import (
    Axis,
    Bar,
    BarChart,
    BarGroup,
    Dot,
    DotChart,
    DotRow,
    HeatChart,
    Line,
    LineChart,
    StackChart,
    is_empty,
    told,
)
from heterotune_flwr.report.charts.png import write_png
from heterotune_flwr.report.charts.scale import apart, ends, ticks

X, Y = Axis("round", "count", 0.0), Axis("accuracy", "share")
LINES = LineChart(
    "Curves",
    X,
    Y,
    [Line("a", [(0, 0.2), (5, 0.5), (10, 0.6)]), Line("b", [(0, 0.2), (10, 0.58)], 1)],
    [(5, "here")],
)
DOTS = DotChart(
    "Dots",
    Axis("accuracy", "share", 0.0),
    [DotRow("a", [Dot(0.1, "x"), Dot(0.1, "y"), Dot(0.3, "z")], 0.17, 0.1)],
)
BARS = BarChart(
    "Bars",
    Axis("gain", "points"),
    [BarGroup("g", [Bar("up", 0.1, spread=0.02), Bar("down", -0.05, 1)])],
)
STACKS = StackChart("Stacks", "bytes", ["up", "down"], [("a", [3e6, 1e6]), ("b", [0.0, 2e6])])
HEAT = HeatChart("Heat", "right", "answered", ["a", "b"], ["a", "b"], [[1.0, 0.0], [0.25, None]])
ALL = (LINES, DOTS, BARS, STACKS, HEAT)
SPACE = "{http://www.w3.org/2000/svg}"


def drawn(chart):
    return ElementTree.fromstring(draw(chart))


def attributes(chart, tag, class_):
    return [
        one.attrib
        for one in drawn(chart).iter(SPACE + tag)
        if class_ in one.attrib.get("class", "").split()
    ]


@pytest.mark.parametrize("chart", ALL, ids=lambda chart: chart.title)
def test_every_kind_is_well_formed_named_and_fits_a_phone(chart):
    root = drawn(chart)
    assert root.find(SPACE + "title").text == root.attrib["aria-label"] == chart.title
    assert root.attrib["viewBox"].startswith("0 0 380 ")
    assert not is_empty(chart)


@pytest.mark.parametrize("chart", ALL, ids=lambda chart: chart.title)
def test_every_kind_becomes_a_picture_for_a_paper(chart, tmp_path):
    pytest.importorskip("matplotlib", reason="extra plots")
    write_png(chart, tmp_path / "chart.png", dpi=72)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_higher_numbers_stand_higher_and_later_ones_further_right():
    line = attributes(LINES, "polyline", "s0")[0]["points"]
    places = [tuple(map(float, point.split(","))) for point in line.split()]
    assert places == sorted(places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


def test_a_number_that_is_none_is_a_gap():
    chart = LineChart(
        "Gap", X, Y, [Line("a", [(0, 0.1), (1, 0.2), (2, math.nan), (3, 0.3), (4, 0.4)])]
    )
    assert len(attributes(chart, "polyline", "line")) == 2
    assert "nan" not in draw(chart)


def test_bars_are_as_long_as_their_values_from_zero():
    up, down = (
        {key: float(one[key]) for key in ("x", "width")} for one in attributes(BARS, "rect", "bar")
    )
    assert up["width"] == pytest.approx(2 * down["width"], rel=0.02)
    assert up["x"] == pytest.approx(down["x"] + down["width"], abs=0.2)


def test_parts_of_a_stack_add_up():
    widths = [float(one["width"]) for one in attributes(STACKS, "rect", "bar")]
    assert widths == pytest.approx([285, 95, 190], abs=2)


def test_equal_dots_do_not_hide_each_other():
    places = {(one["cx"], one["cy"]) for one in attributes(DOTS, "circle", "mark")}
    assert len(places) == 3


def test_shade_grows_with_the_value_and_what_is_not_there_has_none():
    shades = [
        float(one["fill-opacity"])
        for one in attributes(HEAT, "rect", "cell")
        if "fill-opacity" in one
    ]
    assert shades == [0.5, 0.0, 0.25]
    assert len(attributes(HEAT, "rect", "nothing")) == 1


def test_names_are_escaped_and_cut():
    name = '<b onload="x">' + "long" * 100
    chart = BarChart(name, Y, [BarGroup("", [Bar(name, 0.5)])])
    assert "<b " not in draw(chart)
    assert all(len(text) < 320 for text in drawn(chart).itertext())


@pytest.mark.parametrize(
    ("low", "high", "unit"),
    [
        (0, 1, "share"),
        (0, 30, "count"),
        (0, 3, "count"),
        (-0.2, 0.6, "cosine"),
        (1e6, 2.6e7, "bytes"),
    ],
)
def test_ticks_are_few_and_round(low, high, unit):
    found = ticks(low, high, unit)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert unit != "count" or all(tick == int(tick) for tick in found)


def test_an_axis_holds_all_values_even_equal_ones():
    assert ends(Axis(""), [3.0, 3.0])[0] < 3 < ends(Axis(""), [3.0, 3.0])[1]
    assert ends(Axis("", "share"), [0.0, 0.0])[0] == 0 < ends(Axis("", "share"), [0.0])[1] <= 0.2
    assert ends(Axis("", "share"), [1.0, 1.0])[1] == 1
    low, high = ends(Axis(""), [0.31, 0.58])
    assert low <= 0.31
    assert high >= 0.58


def test_names_beside_each_other_are_moved_apart():
    found = apart([50, 52, 51, 200], 14, 0, 236)
    assert sorted(found) == [found[0], found[2], found[1], found[3]]
    assert all(b - a >= 14 for a, b in zip(sorted(found), sorted(found)[1:], strict=False))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.565, "share", "56.5 %"), (-0.031, "points", "\u22123.1"), (0.0, "points", "0.0"), (34640, "bytes", "34.6 kB"),
     (0.25, "seconds", "0.25 s"), (300, "seconds", "5.0 min"), (-0.09, "cosine", "\u22120.09"),
     (math.nan, "share", "–"), (1135, "number", "1\u202f135"), (0.5507, "number", "0.551"),
     (1e99, "nats", "1e+99")],
)  # fmt: skip
def test_values_are_written_as_people_do(value, unit, text):
    assert told(value, unit).replace("\u00a0", " ") == text


def test_a_page_without_numbers_has_no_chart():
    assert is_empty(LineChart("", X, Y, [Line("a", [])]))
    assert is_empty(HeatChart("", "", "", ["a"], ["a"], [[None]]))
    assert not re.search("NaN|nan|inf", draw(LineChart("", X, Y, [Line("a", [])])))
