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
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State

KINDS = ("sgd", "momentum", "adam", "yogi", "adagrad")
_ADAPTIVE = KINDS[2:]


@dataclass(frozen=True)
class ServerOptimizer:
    """One server optimizer; the state belongs to the caller.

    Attributes
    ----------
    kind
        One of :data:`KINDS`.
    learning_rate
        eta; None: 1 for ``sgd`` and ``momentum``, 0.01 for the adaptive ones, whose steps do not shrink with D.
    momentum, beta2, tau
        beta, beta2 and tau above.

    Raises
    ------
    ConfigError
        An unknown kind, or a number outside its range.

    """

    kind: str = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"server optimizer {self.kind!r} is unknown; choose {', '.join(KINDS)}"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(
                f"the server's learning_rate is {self.learning_rate}, it must be above 0"
            )
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"the server's {name} is {getattr(self, name)}, it must be in [0, 1)"
                )
        if not self.tau > 0:
            raise ConfigError(f"the server's tau is {self.tau}, it must be above 0")

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.01 if self.kind in _ADAPTIVE else 1.0

    def step(self, state: State, change: Vector) -> tuple[State, Vector]:
        """New state and step for the round's combined change, any shape; an empty state starts anew."""
        if self.kind == "sgd":
            return {}, self.rate * change
        first = state.get("first", np.zeros_like(change))
        if self.kind == "momentum":
            first = self.momentum * first + change
            return {"first": first}, self.rate * first
        first = self.momentum * first + (1 - self.momentum) * change
        second = self._second(state.get("second", np.full_like(change, self.tau**2)), change**2)
        step = self.rate * first / (np.sqrt(second) + self.tau)
        return {"first": first, "second": second}, step

    def _second(self, old: Vector, square: Vector) -> Vector:
        if self.kind == "adagrad":
            return old + square
        if self.kind == "yogi":
            return old - (1 - self.beta2) * square * np.sign(old - square)
        return self.beta2 * old + (1 - self.beta2) * square
