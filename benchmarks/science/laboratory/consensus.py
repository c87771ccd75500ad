"""The type phase in the laboratory: what all clients of a run predict on public anchors teaches each of them.

The rules of :mod:`heterotune_flwr.channels.predictions.server` on latents instead of backbones. Only clients that share
across types take part. Backbones without any data ("guests") fit the predictions on all anchors after the last round
(:mod:`heterotune_flwr.strategies.guests`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.science.laboratory.clients import LatentTask, mixture
from heterotune_flwr.channels.predictions.options import PredictionOptions
from heterotune_flwr.channels.predictions.server import (
    agreement_weights,
    confidence_weighted_mean,
    sinkhorn_balance,
)

#: Of ``conf/strategy/heterotune.yaml``.
OPTIONS = PredictionOptions(anchors=512, pool=1024, batch=64, guest_anchors=6000)


class Lessons:
    """The consensus of every run at once.

    Parameters
    ----------
    tasks
        Of the types, guests last; their anchors are the same texts in the same order.
    kinds, runs
        Type and run of every client that learns.
    options
        See :class:`heterotune_flwr.channels.predictions.options.PredictionOptions`.

    """

    def __init__(
        self,
        tasks: Sequence[LatentTask],
        kinds: Tensor,
        runs: Tensor,
        options: PredictionOptions = OPTIONS,
    ) -> None:
        self._z = torch.stack([task.anchors_z for task in tasks])
        self._logits = torch.stack([task.anchors_logits for task in tasks])
        self._effects = torch.stack([task.effect.T for task in tasks])
        self._kinds, self._runs, self._options = kinds, runs, options
        self._rng = torch.Generator().manual_seed(1)
        self.chosen = torch.empty(0, dtype=torch.long)
        self.targets = torch.empty(0)

    def _logs(self, bank: Mapping[str, Tensor], kinds: Tensor, drawn: Tensor) -> Tensor:
        """Log label probabilities (N x B x C) of some anchors (N x B), each client by its own model."""
        rows = kinds[:, None]
        moved = torch.bmm(mixture(bank, self._z[rows, drawn]), self._effects[kinds])
        return functional.log_softmax(self._logits[rows, drawn] + moved, dim=-1)

    @torch.no_grad()
    def aggregate(self, bank: Mapping[str, Tensor], everything: bool = False) -> None:
        """Average what clients predict on newly drawn anchors (or on ``everything``), run by run."""
        pool = len(self._z[0]) if everything else min(self._options.pool, len(self._z[0]))
        count = pool if everything else min(self._options.anchors, pool)
        self.chosen = torch.randperm(pool, generator=self._rng)[:count]
        drawn = self.chosen.repeat(len(self._kinds), 1)
        said = self._logs(bank, self._kinds, drawn).exp().numpy()
        found = []
        for run in range(int(self._runs.max()) + 1):
            own = said[(self._runs == run).numpy()]
            shares = agreement_weights(list(own), self._options.agreement_power)
            mean, _ = confidence_weighted_mean(list(own), shares, self._options.entropy_power)
            found.append(sinkhorn_balance(mean, self._options.balance))
        self.targets = torch.from_numpy(np.stack(found)).float()

    def loss(
        self,
        bank: Mapping[str, Tensor],
        kinds: Tensor | None = None,
        runs: Tensor | None = None,
    ) -> Tensor:
        """Sum over clients of the mean cross-entropy of one step's anchors."""
        kinds = self._kinds if kinds is None else kinds
        runs = self._runs if runs is None else runs
        count = len(self.chosen)
        places = torch.rand(len(kinds), count, generator=self._rng).argsort(1)
        places = places[:, : min(self._options.batch, count)]
        logs = self._logs(bank, kinds, self.chosen[places])
        return -(self.targets[runs[:, None], places] * logs).sum(-1).mean(1).sum()
