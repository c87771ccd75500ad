"""What a finished strategy hands over: one row per client, statistics per type, every round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from heterotune_flwr.federation.kept import Kept, summary
from heterotune_flwr.protocol.metrics import MEASURED, TESTS

MEASURES = tuple(f"{scope}_{name}" for scope in TESTS for name in MEASURED)


@dataclass
class ClientRow:
    """One client's evaluation; a measure that was not taken is None, and ``kept`` where it told of no choice.

    ``details``: what it told of its last test beyond means (:meth:`..protocol.details.Details.to_json`).
    """

    client_id: str
    type_key: str
    examples: int
    global_accuracy: float | None = None
    global_loss: float | None = None
    global_exact_match: float | None = None
    global_rouge_l: float | None = None
    personal_accuracy: float | None = None
    personal_loss: float | None = None
    personal_exact_match: float | None = None
    personal_rouge_l: float | None = None
    kept: Kept | None = None
    details: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``clients`` in results.json."""
        measures = {name: getattr(self, name) for name in MEASURES}
        return {
            "client_id": self.client_id,
            "type": self.type_key,
            **measures,
            "examples": self.examples,
            **({"kept": self.kept.to_json()} if self.kept else {}),
            **({"details": dict(self.details)} if self.details else {}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ClientRow:
        """Read what :meth:`to_json` wrote; a measure that an older version did not take is None."""
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in entry.items() if name in known}
        kept = Kept.from_json(entry["kept"]) if entry.get("kept") else None
        return cls(**{**given, "type_key": entry["type"], "kept": kept})


def over_clients(values: Sequence[float], measure: str) -> dict[str, float]:
    """``mean``, ``std``, ``worst`` and ``worst10`` of a measure over clients, of whom there is one at least.

    The worst of a loss is its maximum, of every other measure its minimum; the worst tenth is the
    mean over the worst 10 % of clients, at least one.
    """
    ordered = np.sort(values)[::-1] if measure.endswith("loss") else np.sort(values)
    tenth = max(1, len(values) // 10)
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "worst": float(ordered[0]),
        "worst10": float(np.mean(ordered[:tenth])),
    }


def statistics(rows: Iterable[ClientRow]) -> dict[str, float]:
    """Return :func:`over_clients` of every measure that was taken, and of how many clients."""
    rows = list(rows)
    result: dict[str, float] = {"clients": len(rows)}
    for name in MEASURES:
        taken = [float(v) for row in rows if (v := getattr(row, name)) is not None]
        if taken:
            parts = over_clients(taken, name)
            result |= {f"{name}_{part}": value for part, value in parts.items()}
    return result


def by_type(rows: Iterable[ClientRow]) -> dict[str, dict[str, float]]:
    """Statistics per model type, in name order."""
    rows = list(rows)
    keys = sorted({row.type_key for row in rows})
    return {key: statistics(row for row in rows if row.type_key == key) for key in keys}


@dataclass
class Outcome:
    """One strategy run with one seed, as it stands in ``runs`` of results.json."""

    strategy: str
    seed: int
    rows: list[ClientRow] = field(default_factory=list)
    before: list[ClientRow] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    bytes: Mapping[str, Any] = field(default_factory=dict)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float | None = None
    refused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    population: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``runs`` in results.json."""
        return {
            "strategy": self.strategy,
            "seed": self.seed,
            "types": by_type(self.rows),
            "overall": statistics(self.rows),
            "kept": summary(row.kept for row in self.rows),
            "before": {"types": by_type(self.before), "overall": statistics(self.before)},
            "population": max(self.population, len(self.rows)),
            "clients": [row.to_json() for row in self.rows],
            "clients_before": [row.to_json() for row in self.before],
            "bytes": dict(self.bytes),
            "alignment": dict(self.alignment),
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "refused": {cid: dict(counts) for cid, counts in self.refused.items()},
            "skipped_rounds": list(self.skipped),
            "rounds": self.rounds,
        }
