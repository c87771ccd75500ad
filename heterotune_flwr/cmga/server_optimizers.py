"""Server optimizers: what the server does with the round's mean change before it applies it.

Small pure functions with explicit state, used by CMGA's ``server_opt`` and by every other strategy
(``server_optimizer`` in its YAML entry). With x the shared weights, D the round's combined change, eta the
``learning_rate``::

    sgd        x += eta D                                   FedAvg at eta = 1 (arXiv 1602.05629)
    momentum   v <- beta v + D;           x += eta v        FedAvgM (arXiv 1909.06335)
    adam       m <- beta m + (1-beta) D;  v <- beta2 v + (1-beta2) D^2;            x += eta m / (sqrt(v) + tau)
    yogi       m as adam;                 v <- v - (1-beta2) D^2 sign(v - D^2);    x as adam
    adagrad    m as adam;                 v <- v + D^2;                            x as adam

The last three are FedOpt (arXiv 2003.00295, algorithm 2), v starting at tau^2. Averages move only in rounds that have
updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heterotune_flwr.cmga.base import Vector
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.fields import check_fields, option

KINDS = ("sgd", "momentum", "adam", "yogi", "adagrad")
_ADAPTIVE = KINDS[2:]


@dataclass(frozen=True)
class ServerOptimizer:
    """What the server does with a round's combined change; the state belongs to the caller.

    Raises
    ------
    ConfigError
        An unknown kind, or a number outside its range.

    """

    kind: str = option(
        "sgd",
        "sgd: plain addition; momentum (FedAvgM); adam, yogi, adagrad (FedOpt)",
        choices=KINDS,
    )
    learning_rate: float | None = option(
        None,
        "eta; null: 1 for sgd and momentum, 0.01 for the others, whose steps do not shrink with the change [per round]",
        above=0,
    )
    momentum: float = option(
        0.9, "beta, how much of the old direction stays [share]", least=0, below=1
    )
    beta2: float = option(
        0.99, "adam, yogi: how much of the old squares stays [share]", least=0, below=1
    )
    tau: float = option(
        1e-3,
        "adam, yogi, adagrad: added to the root of the squares; the smaller, the bolder [change]",
        above=0,
    )

    def __post_init__(self) -> None:
        check_fields(self, "server_optimizer")

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.01 if self.kind in _ADAPTIVE else 1.0

    def step(self, change: Vector, state: State) -> tuple[Vector, State]:
        """Step for the round's combined change, any shape, and the new state; an empty state starts anew."""
        if self.kind == "sgd":
            return self.rate * change, {}
        first = state.get("first", np.zeros_like(change))
        if self.kind == "momentum":
            first = self.momentum * first + change
            return self.rate * first, {"first": first}
        first = self.momentum * first + (1 - self.momentum) * change
        second = self._second(state.get("second", np.full_like(change, self.tau**2)), change**2)
        step = self.rate * first / (np.sqrt(second) + self.tau)
        return step, {"first": first, "second": second}

    def _second(self, old: Vector, square: Vector) -> Vector:
        if self.kind == "adagrad":
            return old + square
        if self.kind == "yogi":
            return old - (1 - self.beta2) * square * np.sign(old - square)
        return self.beta2 * old + (1 - self.beta2) * square
