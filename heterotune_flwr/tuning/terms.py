"""What a strategy may change in local training: the optimizer, and terms added to the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heterotune_flwr.dema.bank import tier_of
from heterotune_flwr.rates import sinking_share, warm_up_share
from heterotune_flwr.schema import TrainConfig

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(
    trained: Mapping[str, nn.Parameter], config: TrainConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Local optimizer of ``train.optimizer``; plain SGD without momentum is what theory speaks of.

    AdamW moves every number by about the rate, however small its gradient: gates, whose gradient is, have a rate of
    their own (``train.gate_rate``).
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained.values(), lr=learning_rate)
    gates = [p for name, p in trained.items() if tier_of(name) == "gate"]
    others = [p for name, p in trained.items() if tier_of(name) != "gate"]
    rates = ((others, learning_rate), (gates, config.gate_rate * learning_rate))
    return torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in rates if group],
        lr=learning_rate, weight_decay=config.weight_decay, fused=True,
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


class GradientTerms:
    """Terms added to every step's gradient, before it is clipped.

    * FedProx (arXiv 1812.06127): ``mu (w - w_round)``, the gradient of ``mu/2 |w - w_round|^2``;
    * SCAFFOLD (arXiv 1910.06378): ``c - c_i``, the server's minus the client's control variate.

    Parameters
    ----------
    trained
        Name -> parameter; their present values are ``w_round``.
    proximal
        mu; 0 for none.
    corrections
        Name -> ``c - c_i``, of the parameters' shapes.

    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        proximal: float = 0.0,
        corrections: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._trained = dict(trained)
        self._proximal = proximal
        self._start = {n: p.detach().clone() for n, p in trained.items()} if proximal else {}
        self._corrections = {
            name: value.to(self._trained[name]) for name, value in (corrections or {}).items()
        }

    def add(self) -> None:
        """Add the terms to the gradients."""
        for name, start in self._start.items():
            parameter = self._trained[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._proximal)
        for name, value in self._corrections.items():
            gradient = self._trained[name].grad
            if gradient is not None:
                gradient.add_(value)
