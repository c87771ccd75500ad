"""Rows and tasks of :mod:`.mechanisms`: what is left out of ``heterotune``, and the federations it is left out of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.science.headline_suites import CLAIMS, Suite
from benchmarks.science.laboratory.text_files import run_overrides

FULL, LABELS, TEXT = "full", ("sections", "wordnet"), ("instructions",)
BOTH = (*LABELS, *TEXT)
_FAMILY = "smollm2_gemma"
#: Of every row on longer answers, whose public texts are dear.
SMALLER = {"predictions": {"anchors": 128, "pool": 192, "batch": 32}}


@dataclass(frozen=True)
class Row:
    """What differs from the preset: options of the strategy, overrides of the run; ``tasks``: where it means something.

    ``added``: what is measured is a part that the preset has not.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    tasks: Sequence[str] = BOTH
    added: bool = False


def _method(**options: Any) -> dict[str, Any]:
    return {"method": options}


def _predictions(**options: Any) -> dict[str, Any]:
    return {"predictions": options}


_CHAIN = [
    {"transform": "within_type_mean"},
    {"transform": "combine", "weights": "equal"},
    {"transform": "server_opt"},
]
ROWS: dict[str, Row] = {
    FULL: Row(),
    "predictions": Row({"predictions": None}),
    "bank_across_types": Row({"personalization_phase": 0.99}),
    "statistics": Row({"statistics": None}, tasks=LABELS),
    "text_view": Row(_method(views=[]), tasks=LABELS),
    "personalization_phase": Row({"personalization_phase": 0.0}),
    "entropy_weights": Row(_predictions(entropy_power=0.0)),
    "agreement_weights": Row(_predictions(agreement_power=0.0)),
    "balance": Row(_predictions(balance=0), tasks=LABELS),
    "statistics_half_fitted": Row({"statistics": {"distill_share": 1.0}}, tasks=LABELS),
    "three_experts_not_one": Row(_method(experts_global=1, inner=96)),
    "three_experts_not_six": Row(_method(experts_global=6, inner=16)),
    "learned_gate": Row(_method(gate="uniform")),
    "slow_gate": Row({"train": {"gate_rate": 1.0}}),
    "clip_to_median": Row({"chain": _CHAIN}),
    "logit_adjustment": Row({"train": {"logit_adjustment": 0.0}}, tasks=LABELS),
    "label_geometry": Row(overrides=("alignment.label_geometry=false",), tasks=LABELS),
    "weighting_by_correlation": Row(overrides=("alignment.weighting=0",)),
    "chosen_shrinkage": Row(overrides=("alignment.shrinkage=[0.01]",)),
    "annealing": Row({"train": {"last_rate": 0.05, "warmup_ratio": 0.5}}, added=True),
}  # fmt: skip


def suite_name(task: str) -> str:
    """The headline's suite of a task with labels."""
    return f"{task}.{_FAMILY}.1"


def suite_of(task: str) -> Suite:
    """A task's federation."""
    if task in LABELS:
        return CLAIMS[suite_name(task)]
    return Suite("open_text", [("tiny-a", "bf16"), ("tiny-b", "int8")], 2, rounds=6)


def overrides_of(task: str, instructions: Path | None) -> list[str]:
    """Overrides of its runs, tested on test texts."""
    found = suite_of(task).overrides("test")
    if task in LABELS:
        return found
    assert instructions is not None
    return [
        *found, *run_overrides(instructions, "test"), "data.examples_per_client=64",
        "data.personal_test_examples=12", "data.max_length=160", "server.evaluate_before=false",
    ]  # fmt: skip
