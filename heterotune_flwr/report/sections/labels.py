"""What models answer: confusion of labels, or sampled answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heterotune_flwr.report.blocks import Answers, Block, Cell, Section, Table, charts, plural
from heterotune_flwr.report.charts.kinds import HeatChart, StackChart, told
from heterotune_flwr.report.facts import ClientFacts, RunFacts
from heterotune_flwr.report.measured import ALL_TYPES, ALONE, BARE, FEDERATED, Confusion
from heterotune_flwr.report.picks import MODEL_NAMES, Lead, lead, number, title_of

#: Labels with a row of their own in a shaded table.
_SHOWN = 20
#: Parts that colours can tell apart in a stacked bar.
_COLOURS = 7
#: Clients with a row of their own in the label mix.
_MIXED = 40
_ANSWERS = 12
_NOT_TOLD = (
    "The clients did not tell it: what their data hold stays with them unless an owner allows more."
)


def _not_told(facts: RunFacts, strategies: Sequence[str] = ()) -> str:
    """Why nobody told it: of ``strategies``, or of any."""
    if any(one.strategy in strategies or not strategies for one in facts.client_outcomes):
        return _NOT_TOLD
    whose = " and ".join(title_of(facts, name) for name in strategies) or "a strategy"
    owners = "" if facts.identity.simulated else ", where the owner of a node allows it"
    return f"Clients tell it in the last test of {whose}{owners}: there was none yet."


def said(facts: RunFacts) -> Section:
    """Labels, or answers side by side."""
    return _answers(facts) if facts.identity.task == "text" or facts.answers else _labels(facts)


def _labels(facts: RunFacts) -> Section:
    how = (
        "Row by row: of the examples that have a label, the share that was answered with each one. "
        "A perfect model has its shade on the diagonal alone."
    )
    main = lead(facts)
    found = [
        one
        for one in facts.confusions
        if (one.strategy, one.seed) == (main.strategy, main.seed) and one.examples
    ]
    if not found:
        return Section("said", "Labels", how, missing=_not_told(facts, [main.strategy]))
    scope = "personal" if any(one.scope == "personal" for one in found) else found[0].scope
    found = [one for one in found if one.scope == scope]
    whole = {one.model: one for one in found if one.type_key == ALL_TYPES}
    drawn = [_heat(whole[model], model) for model in (BARE, FEDERATED) if model in whole]
    return Section(
        "said", "Labels", how, [_f1_table(found, main), *charts(*drawn), *_each_label(whole)]
    )


def _heat(one: Confusion, model: str) -> HeatChart:
    order = sorted(range(len(one.labels)), key=lambda index: -sum(one.counts[index]))[:_SHOWN]
    order.sort()
    names = [one.labels[index] for index in order]
    values = [
        [
            one.counts[row][column] / total if (total := sum(one.counts[row])) else None
            for column in order
        ]
        for row in order
    ]
    kind = MODEL_NAMES.get(model, model)
    return HeatChart(f"Confusion of the {kind} models", "right", "answered", names, names, values)


def _f1_table(found: Sequence[Confusion], main: Lead) -> Table:
    keys = sorted({one.type_key for one in found})
    models = [
        model for model in (BARE, ALONE, FEDERATED) if any(one.model == model for one in found)
    ]
    lines: list[list[Cell | str]] = []
    for key in keys:
        of_type = {one.model: one for one in found if one.type_key == key}
        examples = max((one.examples for one in of_type.values()), default=0)
        scores = [number(of_type[m].macro_f1 if m in of_type else None, "share") for m in models]
        lines.append(
            [
                Cell("all types" if key == ALL_TYPES else key, small=plural(examples, "example")),
                *scores,
            ]
        )
    heads = ["type", *(MODEL_NAMES[model] for model in models)]
    return Table(heads, lines, f"{main.title}: macro-F1", frozenset(range(1, len(heads))), "table-f1",
                 note="Macro-F1 counts every label alike, however rare; accuracy every example.")  # fmt: skip


def _each_label(whole: Mapping[str, Confusion]) -> list[Block]:
    ours = whole.get(FEDERATED)
    if ours is None:
        return []
    shown = [(model, whole[model]) for model in (BARE, FEDERATED) if model in whole]
    lines: list[list[Cell | str]] = []
    for index, label in enumerate(ours.labels):
        row = ours.counts[index]
        if not sum(row):
            continue
        wrong = (
            max((count, other) for other, count in enumerate(row) if other != index)
            if len(row) > 1
            else (0, 0)
        )
        taken_for = f"{ours.labels[wrong[1]]} ({wrong[0]})" if wrong[0] else "–"
        scores = [number(one.f1.get(label), "share") for _, one in shown]
        lines.append([label, told(sum(row), "count"), *scores, taken_for])
    heads = [
        "label",
        "examples",
        *(f"F1 {MODEL_NAMES[model]}" for model, _ in shown),
        "most often taken for",
    ]
    numbers = frozenset(range(1, len(heads) - 1))
    return [Table(heads, lines, "Label by label", numbers, "table-labels")]


def _answers(facts: RunFacts) -> Section:
    how = "Each box is one example of a client's test: the task, the right answer, and what each model says."
    main = lead(facts)
    mine = [one for one in facts.answers if one.strategy == main.strategy] or facts.answers
    if not mine:
        return Section("said", "Answers", how, missing=_not_told(facts))
    blocks: list[Block] = [
        Answers(
            one.prompt,
            one.reference,
            [
                (MODEL_NAMES.get(model, model), one.answers[model],
                 one.answers[model].strip().casefold() == one.reference.strip().casefold())
                for model in MODEL_NAMES
                if model in one.answers
            ],
            f"{one.client_id}, {one.type_key}",
        )
        for one in mine[:_ANSWERS]
    ]  # fmt: skip
    return Section("said", "Answers", how, blocks)


def has_labels(facts: RunFacts) -> bool:
    """Whether a mix of labels can be: it was told, or answers are no open text."""
    return facts.identity.task != "text" or any(one.label_mix for one in facts.clients)


def mix(facts: RunFacts) -> Section:
    """Which labels each client holds."""
    how = "Each row is one client: how its training examples divide among the labels."
    known = [(one, one.label_mix) for one in facts.clients if one.label_mix]
    if not known:
        return Section("mix", "Label mix", how, missing=_not_told(facts))
    labels = sorted({label for _, told_of in known for label in told_of})
    shown = known[:_MIXED]
    chart = _mix_chart(shown, labels)
    lines: list[list[Cell | str]] = []
    for client, told_of in shown:
        total = sum(told_of.values())
        top = sorted(told_of, key=lambda label: (-told_of[label], label))[:3]
        words = ", ".join(
            f"{label} {told(told_of[label] / max(total, 1), 'share')}" for label in top
        )
        lines.append(
            [
                Cell(client.client_id, small=client.type_key),
                told(total, "count"),
                str(len(told_of)),
                words,
            ]
        )
    rest = len(facts.clients) - len(shown)
    note = f"{plural(rest, 'client')} more: not told, or in report --csv." if rest else ""
    table = Table(
        ["client", "examples", "labels", "most frequent"],
        lines,
        "",
        frozenset({1, 2}),
        "table-mix",
        note=note,
    )
    return Section("mix", "Label mix", how, [*charts(chart), table])


def _mix_chart(
    shown: Sequence[tuple[ClientFacts, dict[str, int]]], labels: Sequence[str]
) -> StackChart | HeatChart:
    if len(labels) <= _COLOURS:
        rows = [
            (one.client_id, [told_of.get(label, 0) for label in labels]) for one, told_of in shown
        ]
        return StackChart("Label mix by client", "count", labels, rows, whole=True)
    totals = {label: sum(told_of.get(label, 0) for _, told_of in shown) for label in labels}
    frequent = sorted(sorted(labels, key=lambda label: -totals[label])[:_SHOWN])
    values: list[list[float | None]] = [
        [told_of.get(label, 0) / max(sum(told_of.values()), 1) for label in frequent]
        for _, told_of in shown
    ]
    return HeatChart(
        "Label mix by client",
        "client",
        "label",
        [one.client_id for one, _ in shown],
        frequent,
        values,
    )
