"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping

from heterotune_flwr.report.blocks import Block, Cell, Prose, Section, Table, charts, plural
from heterotune_flwr.report.charts.kinds import Axis, Bar, BarChart, BarGroup, Line, LineChart
from heterotune_flwr.report.facts import Comparison, RunFacts
from heterotune_flwr.report.measured import ALL_TYPES, ALONE, BARE
from heterotune_flwr.report.picks import (
    MODEL_NAMES,
    Lead,
    lead,
    number,
    rows,
)
from heterotune_flwr.report.sections.course import MOST_LINES, axes, points
from heterotune_flwr.report.sections.outcome import models_table
from heterotune_flwr.report.sections.state import state_sentence, state_tone, trouble_sentence
from heterotune_flwr.report.sections.trust import shown


def comparison_sections(compared: Comparison) -> list[Section]:
    """Every section of a page about several runs."""
    runs = compared.runs
    return [
        _overview(runs),
        _each(runs),
        _curves(runs),
        _costs(runs),
        _trouble(runs),
        _differences(compared),
    ]


def _overview(runs: Mapping[str, RunFacts]) -> Section:
    how = "Each row is one run, by its federated models; compare rows only where data, rounds and clients are alike."
    lines: list[list[Cell | str]] = []
    bars = []
    leads = {name: lead(facts) for name, facts in runs.items()}
    for index, (name, facts) in enumerate(runs.items()):
        main = leads[name]
        found = _means(facts, main)
        lines.append([
            Cell(name, small=f"{main.title}, {main.name}" if facts.runs else ""),
            Cell(facts.identity.state, state_tone(facts)),
            *[number(found.get(kind), main.unit) for kind in (BARE, ALONE, "subject")],
            _size(facts),
        ])  # fmt: skip
        if "subject" in found:
            bars.append(Bar(name, found["subject"], index))
    heads = ["run", "state", MODEL_NAMES[BARE], MODEL_NAMES[ALONE], "federated", "size"]
    table = Table(heads, lines, "", frozenset({2, 3, 4}), "table-runs")
    first = next(iter(leads.values()))
    alike = {(main.measure, main.scope) for main in leads.values()} == {
        (first.measure, first.scope)
    }
    chart = BarChart(
        f"Federated models: {first.name}", Axis(first.name, first.unit, 0.0), [BarGroup("", bars)]
    )
    rest: list[Block] = (
        charts(chart)
        if alike
        else [Prose("The runs are measured differently: no chart puts them side by side.")]
    )
    return Section("summary", "Runs side by side", how, [table, *rest])


def _size(facts: RunFacts) -> str:
    counted = [(facts.identity.clients, "client"), (facts.identity.rounds or 0, "round")]
    return ", ".join(plural(count, one) for count, one in counted if count) or "–"


def _means(facts: RunFacts, main: Lead) -> dict[str, float]:
    found = {}
    for row in rows(facts):
        value = row.mean(main.scope, main.measure)
        if value is not None:
            found[
                "subject"
                if row.strategy == main.strategy and row.kind not in (BARE, ALONE)
                else row.kind
            ] = value
    return found


def _each(runs: Mapping[str, RunFacts]) -> Section:
    how = "For each run, every way to get a model that it compared."
    tables: list[Block] = []
    for index, (name, facts) in enumerate(runs.items()):
        if found := rows(facts):
            tables.append(models_table(facts, lead(facts), found, name, f"table-models-{index}"))
    return Section("models", "Models of each run", how, tables, "No run has answered a test yet.")


def _curves(runs: Mapping[str, RunFacts]) -> Section:
    how = "One line a run, of its federated models: over rounds, and over the bytes that training sent."
    drawn = []
    mains = {name: lead(facts) for name, facts in runs.items()}
    measures = {f"{main.scope}_{main.measure}" for main in mains.values()}
    for measure in [*sorted(measures), "train_loss"]:
        for over in ("rounds", "bytes"):
            lines = []
            for index, (name, facts) in enumerate(list(runs.items())[:MOST_LINES]):
                if measure not in ("train_loss", f"{mains[name].scope}_{mains[name].measure}"):
                    continue
                own = [
                    curve for curve in facts.curves
                    if (curve.measure, curve.strategy, curve.type_key) == (measure, mains[name].strategy, ALL_TYPES)
                ]  # fmt: skip
                lines.append(Line(name, points(own, over), index))
            told_of = [one for one in lines if one.points]
            if len(told_of) < 2:  # a line alone is compared with nothing; the run's own page has it
                continue
            x, y = axes(measure, over)
            drawn.append(
                LineChart(
                    f"{y.label[0].upper()}{y.label[1:]} over {over}, by run",
                    x,
                    y,
                    told_of,
                )
            )
    why = "No two runs have finished a round and tell the same measure."
    return Section("curves", "Curves", how, charts(*drawn), why)


def _costs(runs: Mapping[str, RunFacts]) -> Section:
    how = "What each run's federated strategy cost; one-time bytes and shared set-up are booked apart."
    lines: list[list[Cell | str]] = []
    for name, facts in runs.items():
        main = lead(facts)
        moved = next((one for one in facts.traffic if one.strategy == main.strategy), None)
        once = (moved.one_time_up or 0) + (moved.one_time_down or 0) if moved else None
        own = [
            run.seconds
            for run in facts.runs
            if run.strategy == main.strategy and run.seconds is not None
        ]
        setup = [phase.seconds for phase in facts.phases if not phase.strategy]
        lines.append([
            name,
            number(moved.train_up if moved else None, "bytes"),
            number(moved.train_down if moved else None, "bytes"),
            number(once, "bytes"), number(sum(own) if own else None, "seconds"),
            number(sum(setup) if setup else None, "seconds"),
        ])  # fmt: skip
    heads = [
        "run",
        "training, up",
        "training, down",
        "once per run",
        "strategy's seconds",
        "shared set-up",
    ]
    return Section(
        "bytes",
        "Bytes and seconds",
        how,
        [Table(heads, lines, "", frozenset(range(1, 6)), "table-costs")],
    )


def _trouble(runs: Mapping[str, RunFacts]) -> Section:
    how = "How each run stands, and what went wrong in it."
    lines: list[list[Cell | str]] = [
        [Cell(name), Cell(state_sentence(facts), state_tone(facts)), trouble_sentence(facts)]
        for name, facts in runs.items()
    ]
    return Section(
        "trouble",
        "What went wrong",
        how,
        [Table(["run", "state", "trouble"], lines, "", frozenset(), "table-trouble")],
    )


def _differences(compared: Comparison) -> Section:
    how = "Settings in which the runs differ; all others are the same in every one."
    lines: list[list[Cell | str]] = []
    for path, values in sorted(compared.settings.items()):
        told_of = "; ".join(f"{name}: {shown(value)}" for name, value in values.items())
        lines.append([path, told_of])
    why = "The runs have the same settings."
    found: list[Block] = (
        [Table(["setting", "in each run"], lines, "", frozenset(), "table-settings")]
        if lines
        else []
    )
    return Section("settings", "Settings that differ", how, found, why)
