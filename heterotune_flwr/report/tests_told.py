"""What clients tell of their last test beyond means: which labels are mistaken, sampled answers, label mixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.jsons import as_list, as_mapping
from heterotune_flwr.protocol.metrics import MODELS
from heterotune_flwr.report.facts import RunFacts, StrategyRun
from heterotune_flwr.report.files import Key, RunFiles
from heterotune_flwr.report.identity import labels_of
from heterotune_flwr.report.measured import ALL_TYPES, Confusion, SampledAnswer

Counts = list[tuple[int, int, int]]


def details(files: RunFiles) -> Iterator[tuple[Key, Mapping[str, Any], Mapping[str, Any]]]:
    """(strategy and seed, the client's row, what it told) of all clients that told anything."""
    for key, run in files.results.items():
        for row in map(as_mapping, as_list(run.get("clients"))):
            if told := as_mapping(row.get("details")):
                yield key, row, told


def counts_of(told: Mapping[str, Any], scope: str, model: str, labels: int) -> Counts:
    """(right label, answered label, how often) by the labels' places; what cannot be is passed over."""
    written = as_mapping(as_mapping(told.get("confusion")).get(scope)).get(model)
    found = []
    for entry in str(written or "").split(","):
        numbers = [int(word) for word in entry.split() if word.isdecimal() and len(word) < 16]
        if len(numbers) == 3 and max(numbers[:2]) < labels and numbers[2]:
            found.append((numbers[0], numbers[1], numbers[2]))
    return found


def confusions(files: RunFiles, runs: Sequence[StrategyRun]) -> list[Confusion]:
    """One table per strategy, seed, model and test: over all types, and by type."""
    labels = labels_of(files)
    if not labels:
        return []
    tables: dict[tuple[Key, str, str, str], np.ndarray[Any, Any]] = {}
    for key, row, told in details(files):
        for scope in as_mapping(told.get("confusion")):
            for model in MODELS:
                for right, answered, times in counts_of(told, scope, model, len(labels)):
                    for type_key in (ALL_TYPES, str(row.get("type"))):
                        place = (key, model, str(scope), type_key)
                        table = tables.setdefault(place, np.zeros((len(labels),) * 2, np.int64))
                        table[right, answered] += times
    return [
        _confusion(*key, model, scope, type_key, labels, table)
        for (key, model, scope, type_key), table in tables.items()
    ]


def _confusion(
    strategy: str,
    seed: int,
    model: str,
    scope: str,
    type_key: str,
    labels: list[str],
    table: np.ndarray[Any, Any],
) -> Confusion:
    right, total = np.diag(table), int(table.sum())
    seen = table.sum(axis=0) + table.sum(axis=1)
    f1 = {
        label: 2 * int(hit) / int(count) if count else None
        for label, hit, count in zip(labels, right, seen, strict=True)
    }
    told = [value for value in f1.values() if value is not None]
    return Confusion(
        strategy,
        seed,
        model,
        scope,
        type_key,
        labels,
        table.tolist(),
        total,
        float(right.sum()) / total,
        float(np.mean(told)),
        f1,
    )


def sampled_answers(files: RunFiles) -> list[SampledAnswer]:
    """Examples of clients' tests and what each model answers."""
    return [
        SampledAnswer(
            str(row.get("client_id")),
            str(row.get("type") or ""),
            *key,
            prompt=str(answer.get("prompt") or ""),
            reference=str(answer.get("reference") or ""),
            answers={name: str(answer[name]) for name in MODELS if answer.get(name) is not None},
        )
        for key, row, told in details(files)
        for answer in map(as_mapping, as_list(told.get("answers")))
    ]


def untold(facts: RunFacts) -> list[str]:
    """Sentences about what a report would show and nobody has told."""
    finished = any(run.state == "finished" for run in facts.runs)
    found = []
    if not facts.client_outcomes:
        return ["no client has been tested after its last round yet"] if not finished else []
    silent = [
        c.client_id for c in facts.clients if c.label_mix is None and c.answers and not c.guest
    ]
    who = "nobody has" if len(silent) == len(facts.clients) else f"{len(silent)} clients have not"
    why = (
        "a node tells it only where its owner allows (details in its node.toml)"
        if facts.identity.simulated is False
        else "the run is older than this, or was not tested to its end"
    )
    if facts.identity.task != "text" and silent:
        found.append(f"{who} told a label mix, or which labels are mistaken: {why}")
    if facts.identity.task == "text" and not facts.answers:
        found.append(f"nobody has told answers: {why}")
    if not any(one.took for one in facts.client_outcomes):
        found.append("nobody has told which model it took home")
    return found
