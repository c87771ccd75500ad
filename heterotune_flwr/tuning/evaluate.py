"""Loss and accuracy of an attached adapter on a list of examples."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.losses import examples_correct
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task

T = TypeVar("T")

_BATCH = 32
_REMEMBERED = 256


@dataclass(frozen=True)
class EvalReport:
    """Mean loss per loss position, share of right examples, number of examples.

    An example is right when its label wins, or (``tokens``) when every token of its answer is the
    most likely one: exactly when greedy generation would give the answer.
    """

    loss: float
    accuracy: float
    examples: int


@torch.no_grad()
def evaluate(
    adapter: AttachedAdapter,
    task: Task,
    rows: Rows,
    prior: torch.Tensor | None = None,
    most: float = math.inf,
) -> EvalReport:
    """Evaluate the adapter with the values it holds, for data with these log label frequencies (C).

    ``most``: what a single loss counts for at most, in nats; where there is such a bound, one that is no number too.
    """
    total_loss, total_rows, total_right = 0.0, 0, 0
    for start in range(0, len(rows), _BATCH):
        chosen = list(range(start, min(start + _BATCH, len(rows))))
        states, targets, owners = rows.rows(chosen)
        losses, correct = task.losses(states, targets, rows.offsets(chosen, prior))
        total_loss += float(bounded(losses.double(), most).sum())
        total_rows += len(losses)
        total_right += int(examples_correct(correct, owners, len(chosen)).sum())
    return EvalReport(total_loss / max(total_rows, 1), total_right / max(len(rows), 1), len(rows))


def bounded(losses: torch.Tensor, most: float) -> torch.Tensor:
    """Losses, none above ``most``, nor NaN where that is a number."""
    return losses.nan_to_num(nan=most).clamp(max=most) if math.isfinite(most) else losses


#: Explicit per-process memory of results by everything they depend on.
_results: OrderedDict[tuple[str, ...], Any] = OrderedDict()


def evaluate_once(adapter: AttachedAdapter, task: Task, rows: Rows, data_key: str) -> EvalReport:
    """As :func:`evaluate`, but equal tensors on equal data are measured once per process.

    Clients of one type that hold the same shared tensors share the result. ``data_key`` must
    identify examples and task.
    """
    return measured_once(adapter, data_key, lambda: evaluate(adapter, task, rows))


def measured_once(adapter: AttachedAdapter, data_key: str, measure: Callable[[], T]) -> T:
    """What ``measure`` gives for the adapter's values, kept per process; ``data_key`` identifies all else."""
    key = (
        adapter.backbone.fingerprint,
        adapter.backbone.type_key,
        repr(adapter.method),
        adapter.maps_digest,
        tensor_digest(adapter.read()),
        data_key,
    )
    if key not in _results:
        _results[key] = measure()
        while len(_results) > _REMEMBERED:
            _results.popitem(last=False)
    result: T = _results[key]
    return result
