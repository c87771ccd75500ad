"""From a step's gradient to its step: terms added to the gradient, the optimizer, the rate's schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from heterotune_flwr.dema.bank import part_of
from heterotune_flwr.rates import sinking_share, warm_up_share
from heterotune_flwr.schema import TrainConfig


class GradientTerm(Protocol):
    """Something added to every step's gradient, before it is clipped."""

    def add(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Add it to the gradients of the trained parameters."""


class Proximal:
    """FedProx (arXiv 1812.06127): ``mu (w - w_round)``, the gradient of ``mu/2 |w - w_round|^2``.

    ``w_round`` are the values that ``trained`` holds when this is made.
    """

    def __init__(self, mu: float, trained: Mapping[str, nn.Parameter]) -> None:
        self._mu = mu
        self._start = {name: p.detach().clone() for name, p in trained.items()}

    def add(self, trained: Mapping[str, nn.Parameter]) -> None:
        """See :class:`GradientTerm`."""
        for name, start in self._start.items():
            parameter = trained[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._mu)


def make_optimizer(trained: Mapping[str, nn.Parameter], work: TrainConfig) -> torch.optim.Optimizer:
    """Local optimizer of ``train.optimizer``; plain SGD without momentum is what theory speaks of.

    AdamW moves every number by about the rate, however small its gradient: gates, whose gradient is, have a rate of
    their own (``train.gate_rate``).
    """
    if work.optimizer == "sgd":
        return torch.optim.SGD(trained.values(), lr=work.learning_rate)
    gates = [p for name, p in trained.items() if part_of(name) == "gate"]
    others = [p for name, p in trained.items() if part_of(name) != "gate"]
    rates = ((others, work.learning_rate), (gates, work.gate_rate * work.learning_rate))
    return torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in rates if group],
        lr=work.learning_rate, weight_decay=work.weight_decay, fused=True,
    )  # fmt: skip


def rate_schedule(
    optimizer: torch.optim.Optimizer, warm: float, sinks_over: int | None = None
) -> torch.optim.lr_scheduler.LRScheduler:
    """Schedule of ``train.warmup_ratio``: step ``i`` of a round, from 1, at ``min(1, i / warm)`` of the rate.

    ``sinks_over``: so many steps in all, over which the rate besides sinks to nothing, as half a cosine.
    """

    def share(done: int) -> float:
        sunk = 1.0 if sinks_over is None else sinking_share(done / sinks_over)
        return warm_up_share(done, warm) * sunk

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
