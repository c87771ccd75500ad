"""Learning from what the federation predicts on public anchors, and predicting on them.

Beside its own examples a client fits, in every step, some anchors: cross-entropy of its label
probabilities against the federation's mean ones (Hinton et al., arXiv 1503.02531; between clients of different models
FedMD, arXiv 1910.03581, and FedDF, arXiv 2006.07242). An anchor has no label, and no client's label frequencies are
counted in: neither in the predictions nor in the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task

_BATCH = 64


@dataclass(frozen=True)
class Distillation:
    """Anchors with target probabilities.

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

    def draw(self, examples: int, rng: np.random.Generator) -> list[int]:
        """Positions (in ``chosen``) of the anchors of one step that has so many examples."""
        count = len(self.chosen)
        size = min(self.batch or examples, count)
        return [int(i) for i in rng.choice(count, size=size, replace=False)]

    def losses(self, task: Task, positions: Sequence[int]) -> Tensor:
        """Weighted cross-entropy of some anchors (float32, one each)."""
        states, _, _ = self.rows.rows([self.chosen[p] for p in positions])
        wanted = self.targets[list(positions)]
        logs = functional.log_softmax(task.label_logits(states), dim=-1)
        return -self.weight * (wanted * logs).sum(dim=-1)


@torch.no_grad()
def predict(task: Task, rows: Rows, chosen: Sequence[int]) -> NDArray[np.float32]:
    """Label probabilities ``n x C`` of some rows, with the values the adapter holds."""
    parts = []
    for start in range(0, len(chosen), _BATCH):
        states, _, _ = rows.rows(chosen[start : start + _BATCH])
        parts.append(functional.softmax(task.label_logits(states), dim=-1).cpu())
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32)
