"""Reads one run directory into :class:`.facts.RunFacts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole, whole_or_none
from heterotune_flwr.report.chosen import protections, settings
from heterotune_flwr.report.costs import phases, traffic
from heterotune_flwr.report.facts import RunFacts, StrategyRun
from heterotune_flwr.report.files import Key, RunFiles, key_of, read_files
from heterotune_flwr.report.happenings import happenings
from heterotune_flwr.report.identity import identity
from heterotune_flwr.report.measured import ALONE, FEDERATED, WITHIN_TYPE
from heterotune_flwr.report.outcomes import client_outcomes, side_by_side, type_outcomes
from heterotune_flwr.report.people import clients, types
from heterotune_flwr.report.rounds import agreement, alignment, channels, curves
from heterotune_flwr.report.tests_told import confusions, sampled_answers, untold
from heterotune_flwr.reporting.measures import class_of
from heterotune_flwr.reporting.tables import TITLES

#: Classes whose models nobody else teaches, and those that share inside a type alone.
_KINDS = {"LocalOnly": ALONE, "WithinType": WITHIN_TYPE}


def read_facts(directory: Path) -> RunFacts:
    """Everything that the files of a run directory say (ConfigError: it is none, or cannot be read)."""
    files = read_files(directory)
    runs = strategy_runs(files)
    outcomes = client_outcomes(files, runs)
    told = confusions(files, runs)
    by_type = type_outcomes(files, runs, outcomes)
    preset, chosen = settings(files)
    facts = RunFacts(
        identity=identity(files, runs),
        has_results=bool(files.results),
        runs=runs,
        types=types(files),
        clients=clients(files),
        side_by_side=side_by_side(files, runs, outcomes, told, by_type),
        type_outcomes=by_type,
        client_outcomes=outcomes,
        confusions=told,
        answers=sampled_answers(files),
        curves=curves(files, runs),
        alignment=alignment(files),
        agreement=agreement(files, runs),
        channels=channels(files, runs),
        traffic=traffic(files, runs),
        phases=phases(files),
        happenings=happenings(files),
        settings=chosen,
        preset=preset,
        protections=protections(files),
        trouble=files.trouble,
    )
    facts.untold = untold(facts)
    for run in facts.runs:
        own = [p.seconds for p in facts.phases if (p.strategy, p.seed) == run.key]
        run.seconds = sum(own) if own else run.seconds
    return facts


def strategy_runs(files: RunFiles) -> list[StrategyRun]:
    """How far every strategy and seed got: those that ran, in their order, then those that were planned besides."""
    keys: dict[Key, None] = dict.fromkeys(files.results)
    keys |= dict.fromkeys(key for event in files.of("start") if (key := key_of(event)))
    section = files.section("run")
    for seed in as_list(section.get("seeds")):
        keys |= dict.fromkeys(
            (str(name), as_whole(seed)) for name in as_list(section.get("compare"))
        )
    measure, scope = main_measure(files)
    return [_strategy_run(files, key, measure, scope) for key in keys]


def _strategy_run(files: RunFiles, key: Key, measure: str, scope: str) -> StrategyRun:
    strategy, seed = key
    entry = files.results.get(key, {})
    own = files.of(
        "start", "resumed", "round", "skipped", "strategy_end", "personalization_phase", key=key
    )
    rounds = [*own, *map(as_mapping, as_list(entry.get("rounds")))]
    done = max(
        (as_whole(e.get("round")) for e in rounds if e.get("event") in ("round", "skipped")),
        default=0,
    )
    started = any(e["event"] == "start" for e in own)
    # A finished run may go on with more rounds; until their end its results are of fewer.
    turns = [e["event"] for e in own if e["event"] in ("start", "strategy_end")]
    ended = turns[-1] == "strategy_end" if "strategy_end" in turns else bool(entry)
    skipped = entry.get("skipped_rounds", [e.get("round") for e in own if e["event"] == "skipped"])
    return StrategyRun(
        strategy=strategy,
        title=TITLES.get(strategy, strategy),
        seed=seed,
        kind=kind_of(files, strategy),
        state="finished" if ended else "unfinished" if started else "not_started",
        rounds_done=done,
        rounds_planned=whole_or_none(files.section("server").get("rounds")),
        seconds=as_number(entry.get("seconds")),
        peak_memory_mb=as_number(entry.get("peak_memory_mb"))
        or max(
            (m for e in own if (m := as_number(e.get("peak_memory_mb"))) is not None), default=None
        ),
        skipped_rounds=[as_whole(number) for number in as_list(skipped)],
        resumed_after=[as_whole(e.get("round")) for e in files.of("resumed", key=key, undone=True)],
        personalized_from=next(
            (as_whole(e.get("round")) for e in own if e["event"] == "personalization_phase"), None
        ),
        population=as_whole(entry.get("population")) or _asked(own),
        measure=measure,
        scope=scope,
    )


def _asked(own: list[Mapping[str, Any]]) -> int:
    return max((as_whole(e.get("clients")) for e in own if e["event"] == "start"), default=0)


def kind_of(files: RunFiles, strategy: str) -> str:
    """Of which kind a strategy's models are, by its class: trained alone, within the type, or federated."""
    return _KINDS.get(class_of(files.section("strategies"), strategy), FEDERATED)


def main_measure(files: RunFiles) -> tuple[str, str]:
    """By which measure, on which test, clients are compared: ROUGE-L where answers were generated; own tests first."""
    rows = [
        as_mapping(row) for entry in files.results.values() for row in as_list(entry.get("clients"))
    ]
    rows += files.of("took_home")
    found = {name for row in rows for name in _measured(row)}
    for scope in ("personal", "global"):
        for measure in ("rouge_l", "accuracy"):
            if f"{scope}_{measure}" in found:
                return measure, scope
    means = {name for event in files.of("evaluate") for name in as_mapping(event.get("overall"))}
    for scope in ("personal", "global"):
        for measure in ("rouge_l", "accuracy"):
            if f"{scope}_{measure}_mean" in means:
                return measure, scope
    return "", ""


def _measured(row: Mapping[str, Any]) -> set[str]:
    tests = [
        row,
        as_mapping(as_mapping(row.get("kept")).get("federated")),
        as_mapping(row.get("federated")),
    ]
    return {name for test in tests for name, value in test.items() if as_number(value) is not None}
