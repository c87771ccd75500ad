"""Learning from what the federation predicts on public anchors, and predicting on them.

Beside its own examples a client fits, in every step, some anchors: cross-entropy of its label
probabilities against the federation's mean ones (Hinton et al., arXiv 1503.02531; between clients of different models
FedMD, arXiv 1910.03581, and FedDF, arXiv 2006.07242). An anchor has no label, and no client's label frequencies are
counted in: neither in the predictions nor in the fit. Of open text :mod:`.token_loss` has the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task

#: Tokens of one batch of predictions, padding included.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Distillation:
    """A loss on anchors with target probabilities (:class:`.losses.LossTerm`).

    Attributes
    ----------
    rows
        All anchors in use.
    chosen
        Which of them have targets, in the order of ``targets``.
    targets
        ``n x C`` probabilities.
    weight
        Of this loss beside the one on the client's own examples.
    batch
        Anchors in every step; 0: as many as a batch holds examples.

    """

    rows: Rows
    chosen: Sequence[int]
    targets: Tensor
    weight: float
    batch: int = 0

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {index: position for position, index in enumerate(self.chosen)}

    def __len__(self) -> int:
        return len(self.chosen)

    def draw(self, batch: int, rng: np.random.Generator) -> list[int]:
        """See :class:`.losses.LossTerm`."""
        size = min(self.batch or batch, len(self.chosen))
        drawn = rng.choice(len(self.chosen), size=size, replace=False)
        return [self.chosen[position] for position in drawn]

    def loss(self, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
        """See :class:`.losses.LossTerm`."""
        return self.losses(task, part).sum() / len(batch)

    def losses(self, task: Task, anchors: Sequence[int]) -> Tensor:
        """Weighted cross-entropy of some anchors (float32, one each), of what the client predicts there."""
        states, _, _ = self.rows.rows(anchors)
        wanted = self.targets[[self._positions[index] for index in anchors]]
        logits = _label_logits(task, self.rows, states, anchors)
        logs = functional.log_softmax(logits, dim=-1)
        return -self.weight * (wanted * logs).sum(dim=-1)


def _label_logits(task: Task, rows: Rows, states: Tensor, indices: Sequence[int]) -> Tensor:
    """Logits of the labels for some rows, with what is added to them."""
    logits, offsets = task.label_logits(states), rows.offsets(indices)
    return logits if offsets is None else logits + offsets


@torch.no_grad()
def predict(task: Task, rows: Rows, chosen: Sequence[int]) -> NDArray[np.float32]:
    """Label probabilities ``n x C`` of some rows, with the values the adapter holds."""
    order: list[int] = []
    parts = []
    for batch in batches_by_length([rows.length(index) for index in chosen], BATCH_TOKENS):
        own = [chosen[position] for position in batch]
        states, _, _ = rows.rows(own)
        logits = _label_logits(task, rows, states, own)
        parts.append(functional.softmax(logits, dim=-1).cpu())
        order += batch
    return np.asarray(torch.cat(parts)[np.argsort(order)].numpy(), dtype=np.float32)
