"""What several sections pick out of a run's facts: which strategy leads, by which measure, averaged over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heterotune_flwr.protocol.metrics import MODEL_TITLES
from heterotune_flwr.report.charts.kinds import Unit, told
from heterotune_flwr.report.facts import RunFacts, SettingFact
from heterotune_flwr.report.measured import (
    ALL_TYPES,
    ALONE,
    BARE,
    FEDERATED,
    KINDS,
    MAJORITY,
    WITHIN_TYPE,
    ClientOutcome,
    SideBySide,
    Spread,
)

MEASURE_NAMES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro-F1",
    "loss": "loss",
}
SCOPE_NAMES = {"global": "common test", "personal": "own tests"}
MODEL_NAMES = {**MODEL_TITLES, "taken": "taken home"}
#: The look of a row, the same all over the page.
STYLES = {FEDERATED: 0, WITHIN_TYPE: 1, ALONE: 2, BARE: 3, MAJORITY: 4}
#: Looks of further strategies.
_OTHERS = (5, 6, 7, 4, 3)


@dataclass(frozen=True)
class Lead:
    """The strategy whose numbers come first, and the measure and test that its clients are compared by."""

    strategy: str
    title: str
    seed: int
    measure: str
    scope: str

    @property
    def unit(self) -> Unit:
        """How its measure is written."""
        return unit_of(self.measure)

    @property
    def points(self) -> str:
        """What a gain is counted in."""
        return "nats" if self.measure == "loss" else "points"

    @property
    def name(self) -> str:
        """``accuracy on own tests``."""
        return f"{MEASURE_NAMES.get(self.measure, self.measure)} on {self.where}"

    @property
    def where(self) -> str:
        """``own tests``, ``the common test``."""
        return "the common test" if self.scope == "global" else "own tests"


def two_untouched(facts: RunFacts) -> str:
    """Why the untouched model has two numbers; empty where it has one."""
    notes = [row.note for row in facts.side_by_side if row.kind == BARE]
    if not any("without" in note for note in notes):
        return ""
    return (
        "The untouched model has two numbers on own tests: the test before round 1 answers with the client's label "
        "frequencies, as trained models do; the last test leaves them out, and gains over untouched are over that one."
    )


def unit_of(measure: str) -> Unit:
    """How a measure is written: losses are nats, all others shares."""
    return "nats" if measure == "loss" else "share"


def lead(facts: RunFacts) -> Lead:
    """Return the run's subject and how it is measured (on own tests, by the task's measure, where no run says)."""
    usual = "rouge_l" if facts.identity.task == "text" else "accuracy"
    of_subject = [run for run in facts.runs if run.strategy == facts.identity.subject]
    runs = [run for run in of_subject if run.measure] or of_subject or facts.runs[-1:]
    if not runs:
        subject = facts.identity.subject
        return Lead(subject, subject or "none", 0, usual, "personal")
    run = runs[0]
    return Lead(run.strategy, run.title, run.seed, run.measure or usual, run.scope or "personal")


def title_of(facts: RunFacts, strategy: str) -> str:
    """What people call a strategy."""
    return next((run.title for run in facts.runs if run.strategy == strategy), strategy) or strategy


def with_seed(facts: RunFacts, title: str, seed: int | None) -> str:
    """A strategy's title, and which seed's it is where a run has several."""
    several = len(facts.identity.seeds) > 1 and seed is not None
    return f"{title}, seed {seed}" if several else title


def own_name(facts: RunFacts, strategy: str) -> str:
    """What a strategy's own models are: ``federated``, or ``lone`` where it shares nothing."""
    kinds = {run.strategy: run.kind for run in facts.runs}
    return "lone" if kinds.get(strategy) == ALONE else "federated"


def style_of(facts: RunFacts, strategy: str) -> int:
    """The look of a strategy: the subject's is the federated one's."""
    if strategy == facts.identity.subject:
        return STYLES[FEDERATED]
    kinds = {run.strategy: run.kind for run in facts.runs}
    kind = kinds.get(strategy, "")
    if kind in (WITHIN_TYPE, ALONE) and strategy in ("within_type", "local_only"):
        return STYLES[kind]
    others = [
        name for name in kinds if name not in (facts.identity.subject, "within_type", "local_only")
    ]
    return _OTHERS[others.index(strategy) % len(_OTHERS)] if strategy in others else 7


def origin_of(setting: SettingFact) -> str:
    """Who chose a setting; one that a person named as the program has it anyway is the program's."""
    same = setting.origin == "user" and setting.value == setting.default
    return "default" if same else setting.origin


def left_as(preset: str) -> str:
    """Where settings come from that nobody named: a preset, or the groups that a user's own file names."""
    if preset.endswith((".yaml", ".yml")):
        return f"the presets named in {preset}"
    return f"the preset {preset}" if preset else "the preset"


@dataclass(frozen=True)
class Row:
    """A model beside others: mean over seeds, and by how much seeds differ."""

    kind: str
    title: str
    strategy: str
    scores: dict[tuple[str, str], Spread]
    over_seeds: dict[tuple[str, str], float]
    note: str = ""

    def mean(self, scope: str, measure: str) -> float | None:
        """Mean over clients and seeds; None where it was not measured."""
        found = self.scores.get((scope, measure))
        return None if found is None else found.mean


def rows(facts: RunFacts, type_key: str = ALL_TYPES) -> list[Row]:
    """Models side by side for a type or all, floor first; a model measured in several strategies counts once."""
    of_type = [row for row in facts.side_by_side if row.type_key == type_key]
    keys: dict[tuple[str, str], list[SideBySide]] = {}
    for row in of_type:
        keys.setdefault((row.kind, row.title), []).append(row)
    found = [_merged(group, facts.identity.subject) for group in keys.values()]
    return sorted(found, key=lambda row: KINDS.index(row.kind) if row.kind in KINDS else 0)


def compared(facts: RunFacts, main: Lead, type_key: str = ALL_TYPES) -> list[Row]:
    """Rows for a glance: of models trained alone one, the subject's own where it has one; all others."""
    found = [row for row in rows(facts, type_key) if row.mean(main.scope, main.measure) is not None]
    lone = [row for row in found if row.kind == ALONE]
    kept = next((row for row in lone if row.strategy == main.strategy), lone[0] if lone else None)
    return [row for row in found if row.kind != ALONE or row is kept]


def _merged(group: Sequence[SideBySide], subject: str) -> Row:
    strategies = {row.strategy for row in group}
    kept = subject if subject in strategies else group[-1].strategy
    chosen = [row for row in group if row.strategy == kept]
    by_key: dict[tuple[str, str], list[Spread]] = {}
    for row in chosen:
        for measure, spread in row.scores.items():
            by_key.setdefault((row.scope, measure), []).append(spread)
    first = chosen[0]
    return Row(
        first.kind,
        first.title,
        kept,
        {key: _mean_spread(spreads) for key, spreads in by_key.items()},
        {
            key: statistics.stdev(spread.mean for spread in spreads)
            for key, spreads in by_key.items()
            if len(spreads) > 1
        },
        next((row.note for row in chosen if row.note), ""),
    )


def _mean_spread(spreads: Sequence[Spread]) -> Spread:
    return Spread(
        statistics.fmean(spread.mean for spread in spreads),
        statistics.fmean(spread.std for spread in spreads),
        average(spread.worst for spread in spreads),
        average(spread.worst10 for spread in spreads),
        spreads[0].clients,
    )


def average(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there."""
    some = [value for value in values if value is not None]
    return statistics.fmean(some) if some else None


def outcomes(facts: RunFacts, strategy: str, seed: int | None = None) -> list[ClientOutcome]:
    """Clients after the last round of a strategy, of one seed or all."""
    return [
        one
        for one in facts.client_outcomes
        if one.strategy == strategy and (seed is None or one.seed == seed)
    ]


def measured(outcome: ClientOutcome, model: str, lead: Lead) -> float | None:
    """A client's number for one of its models."""
    return outcome.models.get(model, {}).get(lead.scope, {}).get(lead.measure)


def number(value: float | None, unit: Unit) -> str:
    """A value as people write it, a dash where there is none."""
    return "–" if value is None else told(value, unit)


def gain(value: float | None, measure: str) -> str:
    """A gain with its sign: in points of a share, of a loss in nats."""
    if value is None:
        return "–"
    return told(value, "cosine" if measure == "loss" else "points")


def tone(value: float | None) -> str:
    """Whether a gain is good news."""
    if value is None or value == 0:
        return "quiet"
    return "good" if value > 0 else "bad"
