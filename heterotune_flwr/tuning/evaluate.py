"""Loss and accuracy of an attached adapter on a list of examples."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

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
    most likely one: exactly when greedy generation would give the answer. ``confusion`` is of a closed label set:
    (right label, answered label, how often), by the labels' places.
    """

    loss: float
    accuracy: float
    examples: int
    confusion: tuple[tuple[int, int, int], ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Its numbers by name, without the confusion."""
        return {"loss": self.loss, "accuracy": self.accuracy, "examples": float(self.examples)}


@dataclass(frozen=True, eq=False)
class ExampleResults:
    """Every example by itself: ``losses`` (n, float64), whose mean is the mean loss per position; ``right`` (n, bool).

    An example's loss is the sum over its positions, by the mean number of positions.
    """

    losses: NDArray[np.float64]
    right: NDArray[np.bool_]

    @property
    def loss(self) -> float:
        """Mean loss per position."""
        return float(self.losses.mean())


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
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in _batches(task, rows, prior, most):
        total_loss += float(batch.losses.sum())
        total_rows += len(batch.losses)
        total_right += int(batch.right.sum())
        if batch.answered is not None:
            pairs.update(zip(batch.targets.tolist(), batch.answered.tolist(), strict=True))
    return EvalReport(
        total_loss / max(total_rows, 1),
        total_right / max(len(rows), 1),
        len(rows),
        tuple((*pair, times) for pair, times in sorted(pairs.items())),
    )


@torch.no_grad()
def evaluate_examples(
    task: Task, rows: Rows, prior: torch.Tensor | None = None, most: float = math.inf
) -> ExampleResults:
    """As :func:`evaluate`, example by example; of at least one."""
    sums, rights, positions = [], [], 0
    for batch in _batches(task, rows, prior, most):
        none = batch.losses.new_zeros(len(batch.right))
        sums.append(none.index_add_(0, batch.owners, batch.losses).cpu())
        rights.append(batch.right.cpu())
        positions += len(batch.losses)
    each = torch.cat(sums) * (len(rows) / positions)
    return ExampleResults(each.numpy(), torch.cat(rights).numpy())


class _Batch(NamedTuple):
    """Losses of some examples' positions (float64), whose they are, and which examples are right.

    ``targets`` and, of a closed label set, ``answered``: labels' places, position by position.
    """

    losses: torch.Tensor
    owners: torch.Tensor
    right: torch.Tensor
    targets: torch.Tensor
    answered: torch.Tensor | None


def _batches(task: Task, rows: Rows, prior: torch.Tensor | None, most: float) -> Iterator[_Batch]:
    """Measure some examples at a time."""
    for start in range(0, len(rows), _BATCH):
        chosen = list(range(start, min(start + _BATCH, len(rows))))
        states, targets, owners = rows.rows(chosen)
        offsets, answered = rows.offsets(chosen, prior), None
        if task.kind == "labels":
            losses, answered = task.label_losses(states, targets, offsets)
            correct = answered == targets
        else:
            losses, correct = task.losses(states, targets, offsets)
        right = examples_correct(correct, owners, len(chosen))
        yield _Batch(bounded(losses.double(), most), owners, right, targets, answered)


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
