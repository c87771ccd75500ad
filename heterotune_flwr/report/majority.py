"""The floor without any model: who always answers the commonest label of its own examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterotune_flwr.jsons import as_mapping, as_whole
from heterotune_flwr.protocol.metrics import MODELS
from heterotune_flwr.report.facts import StrategyRun
from heterotune_flwr.report.files import RunFiles
from heterotune_flwr.report.identity import labels_of
from heterotune_flwr.report.measured import ALL_TYPES, MAJORITY, SideBySide, Spread
from heterotune_flwr.report.tests_told import counts_of, details

_NOTE = "always the commonest label in training: on own tests the client's own, on the common test all clients'"


def majority_rows(files: RunFiles, runs: Sequence[StrategyRun]) -> list[SideBySide]:
    """For each seed and test a row over all clients that told; none where nobody did."""
    labels, found = labels_of(files), []
    for seed in dict.fromkeys(run.seed for run in runs):
        told = {
            str(row.get("client_id")): facts for key, row, facts in details(files) if key[1] == seed
        }
        mixes = {cid: _mix(facts) for cid, facts in told.items()}
        together = _commonest(_sum(mixes.values()))
        own, common = [], None
        for client_id, facts in told.items():
            if (
                share := _share(facts, "personal", _commonest(mixes[client_id]), labels)
            ) is not None:
                own.append(share)
            if common is None:
                common = _share(facts, "global", together, labels)
        for scope, shares in (("global", [] if common is None else [common]), ("personal", own)):
            if shares:
                mean = sum(shares) / len(shares)
                accuracy = Spread(mean, worst=min(shares), clients=len(shares))
                found.append(
                    SideBySide(
                        MAJORITY,
                        "majority",
                        "",
                        seed,
                        scope,
                        ALL_TYPES,
                        {"accuracy": accuracy},
                        _NOTE,
                    )
                )
    return found


def _mix(told: Mapping[str, Any]) -> Counter[str]:
    return Counter({str(k): as_whole(v) for k, v in as_mapping(told.get("label_mix")).items()})


def _sum(mixes: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for mix in mixes:
        total.update(mix)
    return total


def _commonest(mix: Counter[str]) -> str | None:
    return max(sorted(mix), key=lambda label: mix[label]) if mix else None


def _share(
    told: Mapping[str, Any], scope: str, label: str | None, labels: Sequence[str]
) -> float | None:
    """Share of a test's examples that have a label."""
    if label is None or label not in labels:
        return None
    for model in reversed(MODELS):
        if counts := counts_of(told, scope, model, len(labels)):
            place = list(labels).index(label)
            hits = sum(times for right, _, times in counts if right == place)
            return hits / sum(times for _, _, times in counts)
    return None
