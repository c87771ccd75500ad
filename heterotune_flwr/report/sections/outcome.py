"""What came out: models side by side, and by type."""

from __future__ import annotations

from collections.abc import Sequence

from heterotune_flwr.report.blocks import Block, Cell, Prose, Section, Table, charts, plural
from heterotune_flwr.report.charts.kinds import (
    Axis,
    Bar,
    BarChart,
    BarGroup,
    told,
)
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.measured import (
    ALL_TYPES,
    ALONE,
    BARE,
    FEDERATED,
    MAJORITY,
    TypeOutcome,
)
from heterotune_flwr.report.picks import (
    MEASURE_NAMES,
    SCOPE_NAMES,
    STYLES,
    Lead,
    Row,
    average,
    compared,
    gain,
    lead,
    number,
    rows,
    style_of,
    tone,
    two_untouched,
    unit_of,
)

_MODELS = (BARE, ALONE, FEDERATED)
_TEXT_FIRST = ("rouge_l", "exact_match", "accuracy", "macro_f1", "loss")
_LABELS_FIRST = ("accuracy", "macro_f1", "exact_match", "rouge_l", "loss")


def models(facts: RunFacts) -> Section:
    """Untouched, majority, alone, within type, federated."""
    main, found = lead(facts), rows(facts)
    how = (
        "Each row is one way to get a model; a useful federation has better numbers than the rows before it. "
        "They are means over clients."
    )
    if not found:
        return Section(
            "models", "Models side by side", how, missing="No test has been answered yet."
        )
    table = models_table(facts, main, found, "All clients", "table-models")
    blocks: list[Block] = [table, *charts(*_models_charts(facts, main, [ALL_TYPES]))]
    unfinished = any(run.state != "finished" for run in facts.runs)
    over = "has had its last test yet" if unfinished else "was tested in this run"
    absent = [
        text
        for kind, text in (
            (
                MAJORITY,
                "Majority (always the most frequent label) is not here: the files do not tell it.",
            ),
            (ALONE, f"Alone is not here: no model that was trained alone {over}."),
        )
        if kind not in {row.kind for row in found}
        and (kind != MAJORITY or facts.identity.task == "labels")
    ]
    blocks += [Prose(text, tone="quiet") for text in absent]
    return Section("models", "Models side by side", how, blocks)


def _columns(found: Sequence[Row], main: Lead, task: str) -> list[tuple[str, str]]:
    """At most four (scope, measure): the main one first, then what else was measured."""
    taken = {key for row in found for key in row.scores}
    order = _TEXT_FIRST if task == "text" else _LABELS_FIRST
    wanted = [(scope, measure) for measure in order for scope in (main.scope, "global", "personal")]
    ranked = [(main.scope, main.measure), *wanted]
    return [key for key in dict.fromkeys(ranked) if key in taken][:4]


def models_table(
    facts: RunFacts, main: Lead, found: Sequence[Row], caption: str, anchor: str
) -> Table:
    """A row per way to get a model."""
    columns = _columns(found, main, facts.identity.task)
    heads = [f"{MEASURE_NAMES[measure]}, {SCOPE_NAMES[scope]}" for scope, measure in columns]
    worst_head = f"worst tenth, {SCOPE_NAMES[main.scope]}"
    lines = []
    for row in found:
        spread = row.scores.get((main.scope, main.measure))
        cells: list[Cell | str] = [Cell(row.title, small=row.note)]
        cells += [_score(row, key) for key in columns]
        cells.append(number(None if spread is None else spread.worst10, main.unit))
        lines.append(cells)
    seeds = len(facts.identity.seeds)
    note = (
        "One seed: small differences are noise; more seeds: run.seeds=[0,1,2]."
        if seeds <= 1
        else f"{seeds} seeds; ± is the standard deviation over seeds."
    )
    if main.scope == "personal":
        note += f" Own tests are small, and skewed as the client's data are. {two_untouched(facts)}".rstrip()
    strong = frozenset(
        number
        for number, row in enumerate(found)
        if row.strategy == main.strategy and row.kind == FEDERATED
    )
    return Table(["model", *heads, worst_head], lines, caption, frozenset(range(1, len(heads) + 2)),
                 anchor, strong, note)  # fmt: skip


def _score(row: Row, key: tuple[str, str]) -> Cell:
    value, spread = row.mean(*key), row.over_seeds.get(key)
    unit = unit_of(key[1])
    around = "" if spread is None else f"± {told(spread, unit)}"
    return Cell(number(value, unit), small=around)


def row_style(facts: RunFacts, row: Row) -> int:
    """The look of a row: of its kind, or of its strategy where several are federated."""
    if row.kind in (BARE, MAJORITY, ALONE):
        return STYLES[row.kind]
    return style_of(facts, row.strategy)


def _models_charts(facts: RunFacts, main: Lead, keys: Sequence[str]) -> list[BarChart]:
    """One chart a type, all to one scale."""
    shown = {key: compared(facts, main, key) for key in keys}
    values = [
        row.mean(main.scope, main.measure) or 0.0 for found in shown.values() for row in found
    ]
    axis = axis_of(main, values)
    return [
        BarChart(
            f"{'All clients' if key == ALL_TYPES else key}: {main.name}",
            axis,
            [BarGroup("", [_bar(facts, row, main) for row in found])],
        )
        for key, found in shown.items()
    ]


def _bar(facts: RunFacts, row: Row, main: Lead) -> Bar:
    key = (main.scope, main.measure)
    title = "alone" if row.kind == ALONE else row.title
    return Bar(title, row.mean(*key) or 0.0, row_style(facts, row), row.over_seeds.get(key))


def types(facts: RunFacts) -> Section:
    """By model type."""
    main = lead(facts)
    how = "Each block is one model type: small and large models do not gain alike."
    found = [
        one
        for one in facts.type_outcomes
        if one.strategy == main.strategy and one.type_key != ALL_TYPES
    ]
    if not found:
        return Section("types", "By type", how, missing="No client of any type was tested yet.")
    by_type: dict[str, list[TypeOutcome]] = {}
    for one in found:
        by_type.setdefault(one.type_key, []).append(one)
    lines = [_type_row(facts, key, group, main) for key, group in sorted(by_type.items())]
    heads = ["type", "before", "after", "worst tenth", "gain over untouched", "gain over alone"]
    note = (
        f"Gains in {main.points}, means over the type's clients. Before: the test before round 1."
    )
    numbers = frozenset(range(1, 6))
    table = Table(heads, lines, f"{main.title}: {main.name}", numbers, "table-types", note=note)
    shown = _models_charts(facts, main, sorted(by_type)[:12])
    return Section("types", "By type", how, [table, *charts(*shown)])


def _type_row(
    facts: RunFacts, key: str, group: Sequence[TypeOutcome], main: Lead
) -> list[Cell | str]:
    def spread(when: str, part: str) -> float | None:
        scopes = [getattr(one, when).get(main.scope, {}).get(main.measure) for one in group]
        return average(getattr(each, part) for each in scopes if each is not None)

    about = next((one for one in facts.types if one.type_key == key), None)
    facts_of = [plural(group[0].clients, "client")]
    if about and about.parameters:
        facts_of.append(f"{_millions(about.parameters)} parameters")
    facts_of += ["guest"] if about and about.guest else []
    facts_of += [f"apart: {about.apart}"] if about and about.apart else []
    over_bare = average(one.gains.federated_over_bare for one in group if one.gains)
    over_alone = average(one.gains.federated_over_alone for one in group if one.gains)
    return [
        Cell(key, small=", ".join(facts_of)),
        number(spread("before", "mean"), main.unit),
        number(spread("after", "mean"), main.unit),
        number(spread("after", "worst10"), main.unit),
        Cell(gain(over_bare, main.measure), tone(over_bare)),
        Cell(gain(over_alone, main.measure), tone(over_alone)),
    ]


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def axis_of(main: Lead, values: Sequence[float]) -> Axis:
    """One axis for charts that stand side by side."""
    if main.measure == "loss":
        return Axis(main.name, "number", 0.0, max(values, default=1.0) or 1.0)
    top = min(1.0, -(-10 * max(values, default=1.0) // 1) / 10) or 0.1
    return Axis(main.name, main.unit, 0.0, top)
