"""What came out, by client: spread, tests, and who took which model and why."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from heterotune_flwr.report.blocks import Block, Cell, Folded, Section, Table, charts
from heterotune_flwr.report.charts.kinds import (
    Dot,
    DotChart,
    DotRow,
)
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.measured import (
    ALONE,
    BARE,
    FEDERATED,
    ClientOutcome,
)
from heterotune_flwr.report.picks import (
    MODEL_NAMES,
    STYLES,
    Lead,
    gain,
    lead,
    measured,
    number,
    outcomes,
    own_name,
    tone,
)
from heterotune_flwr.report.sections.outcome import axis_of

#: Clients with a row of their own; of more the worst and the best.
MOST_CLIENTS = 60
#: Dots in a row of a chart.
_MOST_DOTS = 200
_MODELS = (BARE, ALONE, FEDERATED)


def clients(facts: RunFacts) -> Section:
    """By client: spread, and who took what."""
    main = lead(facts)
    how = (
        "Each dot is one client, the tall line is their mean, the wedge below the mean of the worst tenth; "
        "the table names them."
    )
    found = outcomes(facts, main.strategy)
    if not found:
        return Section(
            "clients",
            "By client",
            how,
            missing="No client has been tested after the last round yet.",
        )
    blocks: list[Block] = charts(*_spreads(facts, main, found))
    blocks.append(_clients_table(facts, main))
    blocks += _choices(facts, main)
    return Section("clients", "By client", how, blocks)


def _spreads(facts: RunFacts, main: Lead, found: Sequence[ClientOutcome]) -> list[DotChart]:
    keys = sorted({one.type_key for one in found})
    axis = axis_of(
        main,
        [
            value
            for one in found
            for model in _MODELS
            if (value := measured(one, model, main)) is not None
        ],
    )
    groups = [("All clients", found)] if len(keys) > 6 else [
        (f"Clients of {key}", [one for one in found if one.type_key == key]) for key in keys
    ]  # fmt: skip
    drawn = []
    for whose, group in groups:
        models_of = [
            dot_row(MODEL_NAMES[model].capitalize(), [
                Dot(value, one.client_id) for one in group if (value := measured(one, model, main)) is not None
            ], STYLES[model], main.measure)
            for model in _MODELS
        ]  # fmt: skip
        shown = [row for row in models_of if row.dots]
        drawn.append(DotChart(f"{whose}: {main.name}", axis, shown))
    return drawn


def dot_row(name: str, dots: Sequence[Dot], style: int, measure: str) -> DotRow:
    """Dots with their mean, and the mean of their worst tenth; of very many only every so many-eth is drawn."""
    if not dots:
        return DotRow(name, [])
    order = sorted(dots, key=lambda dot: dot.value, reverse=measure == "loss")
    values = [dot.value for dot in order]
    worst = statistics.fmean(values[: max(1, len(values) // 10)])
    every = -(-len(order) // _MOST_DOTS)
    shown = dots if every == 1 else order[::every]
    note = "" if every == 1 else f" (a dot for every {every} clients)"
    return DotRow(f"{name}{note}", shown, statistics.fmean(values), worst, style)


def _clients_table(facts: RunFacts, main: Lead) -> Table:
    found = outcomes(facts, main.strategy, main.seed)
    about = {one.client_id: one for one in facts.clients}
    chosen, left = _chosen(found, main)
    lines: list[list[Cell | str]] = []
    for one in chosen:
        client = about.get(one.client_id)
        small = [one.type_key]
        if client is not None and client.examples is not None:
            small.append(f"{client.examples} examples")
        if client is not None and client.state != "in":
            small.append(client.state.replace("_", " "))
        gains = (
            [one.gains.federated_over_bare, one.gains.federated_over_alone]
            if one.gains
            else [None, None]
        )
        took = MODEL_NAMES.get(one.took, one.took) or "–"
        lines.append(
            [
                Cell(one.client_id, small=", ".join(small)),
                *[number(measured(one, model, main), main.unit) for model in _MODELS],
                *[Cell(gain(value, main.measure), tone(value)) for value in gains],
                Cell(took, small=_own_rounds(one) if one.took == FEDERATED else ""),
            ]
        )
    rest = f" The {left} clients between are left out here; report --csv has all." if left else ""
    seed = f" Seed {main.seed}." if len(facts.identity.seeds) > 1 else ""
    own = own_name(facts, main.strategy)
    note = f"Gains of the {own} model, in {main.points}.{seed}{rest}"
    if any(one.choosing_loss for one in chosen):
        note += " What it took home each client chose by other examples than those of its test."
    heads = [
        "client",
        "untouched",
        "alone",
        own,
        "over untouched",
        "over alone",
        "took home",
    ]
    numbers = frozenset(range(1, 6))
    return Table(heads, lines, f"{main.title}: {main.name}", numbers, "table-clients", note=note)


def _choices(facts: RunFacts, main: Lead) -> list[Block]:
    """What clients chose by, where they told it."""
    found = outcomes(facts, main.strategy, main.seed)
    shown, _ = _chosen([one for one in found if one.took and one.choosing_loss], main)
    if not shown:
        return []
    lines: list[list[Cell | str]] = [
        [
            one.client_id,
            MODEL_NAMES.get(one.took, one.took),
            *[number(one.choosing_loss.get(model), "nats") for model in (BARE, ALONE)],
            Cell(number(one.choosing_loss.get(FEDERATED), "nats"), small=_own_rounds(one)),
            number(one.chosen_by, "count"),
        ]
        for one in shown
    ]
    own = own_name(facts, main.strategy)
    heads = ["client", "took home", "untouched", "alone", own, "examples"]
    note = (
        "A client begins with the untouched model. It goes on to the lone one if that is surely better (by more than a "
        "standard error) in loss or score; then to the federated one if that is surely better than the model so far, "
        "and no worse than any other in either (not surely worse than a lone one that the untouched one surely beats). "
        "Scores on these few examples are not told."
    )
    caption = "Loss on the examples that each client set aside to choose by"
    table = Table(heads, lines, caption, frozenset({2, 3, 4, 5}), "table-choices", note=note)
    return [Folded("Why each client took what it took", [table])]


def _own_rounds(one: ClientOutcome) -> str:
    """How many rounds on its own examples its federated model had after the run's; nothing for none."""
    more = "round" if one.own_rounds == 1 else "rounds"
    return f"after {one.own_rounds} own {more}" if one.own_rounds else ""


def _chosen(found: Sequence[ClientOutcome], main: Lead) -> tuple[list[ClientOutcome], int]:
    """Clients that are shown, in the order of their names: all, or the worst two thirds and the best third."""
    if len(found) <= MOST_CLIENTS:
        return sorted(found, key=lambda one: (one.type_key, one.client_id)), 0
    sign = -1 if main.measure == "loss" else 1
    order = sorted(
        found, key=lambda one: (sign * (measured(one, FEDERATED, main) or 0.0), one.client_id)
    )
    best = MOST_CLIENTS // 3
    shown = [*order[: MOST_CLIENTS - best], *order[-best:]]
    return shown, len(found) - MOST_CLIENTS
