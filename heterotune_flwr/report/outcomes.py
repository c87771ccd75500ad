"""Models side by side, and what came out for every type and client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.federation.outcome import over_clients
from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole, whole_or_none
from heterotune_flwr.protocol.metrics import MEASURED, MODELS, TESTS
from heterotune_flwr.report.facts import StrategyRun
from heterotune_flwr.report.files import RunFiles
from heterotune_flwr.report.majority import majority_rows
from heterotune_flwr.report.measured import (
    ALL_TYPES,
    ALONE,
    BARE,
    FEDERATED,
    KINDS,
    ClientOutcome,
    Confusion,
    Gains,
    SideBySide,
    Spread,
    TypeOutcome,
)

Tests = dict[str, dict[str, float]]


def spread(values: Sequence[float], measure: str) -> Spread | None:
    """As results.json has it; None of nothing."""
    return Spread(**over_clients(values, measure), clients=len(values)) if values else None


def tests_of(entry: Mapping[str, Any]) -> Tests:
    """``global``, ``personal`` -> measure -> value, of fields like ``personal_loss``; empty scopes are left out."""
    found: Tests = {}
    for scope in TESTS:
        for measure in MEASURED:
            if (value := as_number(entry.get(f"{scope}_{measure}"))) is not None:
                found.setdefault(scope, {})[measure] = value
    return found


def client_outcomes(files: RunFiles, runs: Sequence[StrategyRun]) -> list[ClientOutcome]:
    """One entry per client, strategy and seed; of a run without results those that told what they took home."""
    found = []
    for run in runs:
        if run.key in files.results:
            rows = [as_mapping(row) for row in as_list(files.results[run.key].get("clients"))]
            found += [_outcome(run, row, as_mapping(row.get("kept"))) for row in rows]
        else:
            told = {str(e.get("client_id")): e for e in files.of("took_home", key=run.key)}
            found += [_outcome(run, event, event) for event in told.values()]
    _fill_in(files, runs, found)
    by_key = {run.key: run for run in runs}
    for one in found:
        run = by_key[one.strategy, one.seed]
        one.gains = _gains(one.models, run.measure, run.scope)
    return found


def _outcome(run: StrategyRun, row: Mapping[str, Any], kept: Mapping[str, Any]) -> ClientOutcome:
    models = {name: tests_of(as_mapping(kept.get(name))) for name in (*MODELS, "taken")}
    models[FEDERATED] = {**models[FEDERATED], **tests_of(row)}
    took = str(kept.get("took") or "")
    # What is called federated there is the strategy's own model.
    took = ALONE if took == FEDERATED and run.kind == ALONE else took
    choosing = as_mapping(kept.get("choosing"))
    losses = {name: as_number(as_mapping(choosing.get(name)).get("loss")) for name in MODELS}
    return ClientOutcome(
        client_id=str(row.get("client_id")),
        type_key=str(row.get("type") or ""),
        strategy=run.strategy,
        seed=run.seed,
        took=took if took in MODELS else "",
        chosen_by=whole_or_none(choosing.get("examples")),
        choosing_loss={name: loss for name, loss in losses.items() if loss is not None},
        models={name: tests for name, tests in models.items() if tests},
        own_rounds=as_whole(as_mapping(choosing.get(FEDERATED)).get("own_rounds")),
    )


def _fill_in(files: RunFiles, runs: Sequence[StrategyRun], found: Sequence[ClientOutcome]) -> None:
    """Where a last test compared nothing: the untouched model of the first test, the lone one of another strategy."""
    kinds = {run.key: run.kind for run in runs}
    alone = {
        (one.seed, one.client_id): one for one in found if kinds[one.strategy, one.seed] == ALONE
    }
    before = {
        (key, str(row.get("client_id"))): tests_of(row)
        for key, entry in files.results.items()
        for row in map(as_mapping, as_list(entry.get("clients_before")))
    }
    for one in found:
        bare = before.get(((one.strategy, one.seed), one.client_id), {})
        if both := {**bare, **one.models.get(BARE, {})}:
            one.models[BARE] = both
        lone = alone.get((one.seed, one.client_id))
        if lone is not None and lone is not one and ALONE not in one.models:
            one.models[ALONE] = lone.models.get(FEDERATED, {})
            one.elsewhere[ALONE] = lone.strategy


def _gains(models: Mapping[str, Tests], measure: str, scope: str) -> Gains | None:
    def value(name: str) -> float | None:
        return models.get(name, {}).get(scope, {}).get(measure)

    def over(name: str, rival: str) -> float | None:
        ours, theirs = value(name), value(rival)
        if ours is None or theirs is None:
            return None
        return theirs - ours if measure == "loss" else ours - theirs

    if not measure or value(FEDERATED) is None:
        return None
    return Gains(
        measure,
        scope,
        over(FEDERATED, BARE),
        over(FEDERATED, ALONE),
        over("taken", BARE),
        over("taken", ALONE),
    )


def type_outcomes(
    files: RunFiles, runs: Sequence[StrategyRun], outcomes: Sequence[ClientOutcome]
) -> list[TypeOutcome]:
    """Every type, and all types together, of every strategy and seed that was tested in its end."""
    found = []
    for run in runs:
        own = [one for one in outcomes if (one.strategy, one.seed) == run.key]
        entry = files.results.get(run.key)
        if entry is None:
            found += _from_journal(files, run, own)
            continue
        before = as_mapping(entry.get("before"))
        parts = {
            ALL_TYPES: (entry.get("overall"), before.get("overall")),
            **{
                name: (statistics, as_mapping(before.get("types")).get(name))
                for name, statistics in as_mapping(entry.get("types")).items()
            },
        }
        found += [
            _type_outcome(run, name, after, first, own) for name, (after, first) in parts.items()
        ]
    return found


def _from_journal(
    files: RunFiles, run: StrategyRun, own: Sequence[ClientOutcome]
) -> list[TypeOutcome]:
    """The last tests that the journal tells of."""
    tests = files.of("evaluate", key=run.key)
    if not tests:
        return []
    first: Mapping[str, Any] = tests[0] if tests[0].get("round") == 0 else {}
    last: Mapping[str, Any] = tests[-1] if tests[-1].get("round") != 0 else {}
    names = [ALL_TYPES, *as_mapping(tests[-1].get("types"))]

    def part(event: Mapping[str, Any], name: str) -> Any:
        return (
            event.get("overall") if name == ALL_TYPES else as_mapping(event.get("types")).get(name)
        )

    return [_type_outcome(run, name, part(last, name), part(first, name), own) for name in names]


def _type_outcome(
    run: StrategyRun, name: str, after: Any, before: Any, outcomes: Sequence[ClientOutcome]
) -> TypeOutcome:
    own = [one for one in outcomes if name in (ALL_TYPES, one.type_key)]
    took = Counter(one.took for one in own if one.took)
    clients = whole_or_none(as_mapping(after or before).get("clients"))
    return TypeOutcome(
        type_key=name,
        strategy=run.strategy,
        seed=run.seed,
        clients=len(own) if clients is None else clients,
        before=_spreads(as_mapping(before)),
        after=_spreads(as_mapping(after)),
        took={model: took[model] for model in MODELS} if took else {},
        gains=_mean_gains([one.gains for one in own if one.gains]),
    )


def _spreads(statistics: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    found: dict[str, dict[str, Spread]] = {}
    for scope in TESTS:
        for measure in MEASURED:
            name = f"{scope}_{measure}"
            if (mean := as_number(statistics.get(f"{name}_mean"))) is not None:
                found.setdefault(scope, {})[measure] = Spread(
                    mean,
                    as_number(statistics.get(f"{name}_std")) or 0.0,
                    as_number(statistics.get(f"{name}_worst")),
                    as_number(statistics.get(f"{name}_worst10")),
                    as_whole(statistics.get("clients")),
                )
    return found


def _mean_gains(gains: Sequence[Gains]) -> Gains | None:
    if not gains:
        return None
    names = ("federated_over_bare", "federated_over_alone", "taken_over_bare", "taken_over_alone")
    means = {}
    for name in names:
        told = [value for one in gains if (value := getattr(one, name)) is not None]
        means[name] = float(np.mean(told)) if told else None
    return Gains(gains[0].measure, gains[0].scope, **means)


def side_by_side(
    files: RunFiles,
    runs: Sequence[StrategyRun],
    outcomes: Sequence[ClientOutcome],
    confusions: Sequence[Confusion],
    by_type: Sequence[TypeOutcome],
) -> list[SideBySide]:
    """The table of models, from the floor up; what was not measured has no row.

    Of a strategy without a last test the means ``by_type`` of the tests it has had stand in.
    """
    found: list[SideBySide] = []
    untouched: dict[tuple[int, str, str], SideBySide] = {}
    for run in runs:
        own = [o for o in outcomes if (o.strategy, o.seed) == run.key]
        means = [] if own else [o for o in by_type if (o.strategy, o.seed) == run.key]
        found += _rows(run, run.kind, FEDERATED, run.title, own)
        found += _mean_rows(run, run.kind, run.title, means)
        found += _rows(run, ALONE, ALONE, f"alone, beside {run.title}", own)
        # The untouched models are the same whatever comes after them.
        for row in (
            *_rows(run, BARE, BARE, "untouched", own),
            *_mean_rows(run, BARE, "untouched", means),
        ):
            untouched.setdefault((row.seed, row.scope, row.type_key), row)
    found += [*untouched.values(), *majority_rows(files, runs)]
    f1 = {(c.strategy, c.seed, c.model, c.scope, c.type_key): c for c in confusions}
    for row in found:
        model = row.kind if row.kind == BARE or row.title.startswith("alone, ") else FEDERATED
        if confusion := f1.get((row.strategy, row.seed, model, row.scope, row.type_key)):
            row.scores["macro_f1"] = Spread(confusion.macro_f1)
    return sorted(found, key=lambda row: (row.seed, KINDS.index(row.kind)))


def _rows(
    run: StrategyRun, kind: str, model: str, title: str, outcomes: Sequence[ClientOutcome]
) -> list[SideBySide]:
    """One model of every client, over all and by type, on either test."""
    found = []
    for type_key in (ALL_TYPES, *sorted({one.type_key for one in outcomes})):
        own = [one for one in outcomes if type_key in (ALL_TYPES, one.type_key)]
        for scope in TESTS:
            measured = [one for one in own if model not in one.elsewhere]
            tests = [one.models.get(model, {}).get(scope, {}) for one in measured]
            scores = {
                measure: told
                for measure in MEASURED
                if (told := spread([t[measure] for t in tests if measure in t], measure))
            }
            if scores:
                note = _note(kind, run, scope, own)
                note = "at that strategy's rate and steps" if model == ALONE else note
                found.append(
                    SideBySide(kind, title, run.strategy, run.seed, scope, type_key, scores, note)
                )
    return found


def _mean_rows(
    run: StrategyRun, kind: str, title: str, means: Sequence[TypeOutcome]
) -> list[SideBySide]:
    """The same of means over clients, where no client's own numbers are known: before training, or so far."""
    return [
        SideBySide(
            kind, title, run.strategy, run.seed, scope, one.type_key, dict(scores),
            _note(kind, run, scope, []) if kind == BARE else "last test so far",
        )
        for one in means
        for scope, scores in (one.before if kind == BARE else one.after).items()
    ]  # fmt: skip


def _note(kind: str, run: StrategyRun, scope: str, outcomes: Sequence[ClientOutcome]) -> str:
    """Where the untouched model was measured: the last test leaves out label frequencies, which the first one has."""
    if kind != BARE or scope != "personal":
        return ""
    compared = any(one.chosen_by is not None for one in outcomes)
    when, how = ("last", "without") if compared else ("first", "with")
    labels = "" if run.measure == "rouge_l" else f", {how} the clients' label frequencies"
    return f"{when} test{labels}"
