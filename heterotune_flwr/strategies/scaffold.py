"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate, mean_delta
from heterotune_flwr.strategies.within_type import WithinType


class Scaffold(WithinType):
    """SCAFFOLD (arXiv 1910.06378, option II) on the bank, inside each model type.

    A client adds ``c - c_i`` to every gradient and keeps ``c_i <- c_i - c - delta_i / (steps rate)``, with a warm-up
    the sum of the steps' rates; the server adds the mean change of the c_i over *all* N clients of the type to c. It
    can tell that change from delta_i, so nothing more travels up; c travels down beside the bank. Derived for SGD:
    ``train.optimizer`` must be ``sgd`` (conf/strategy/scaffold.yaml sets it). Heterogeneity: any model types (each a
    federation of its own), any bits.
    """

    remembered = ("_controls",)

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        if self.config.train.optimizer != "sgd":
            raise ConfigError(
                f"strategy {context.name}: SCAFFOLD's correction is a gradient's, which AdamW rescales; "
                f"set strategies.{context.name}.train.optimizer=sgd"
            )
        self._controls: dict[str, Tensors] = {}

    def controls(self, type_key: str) -> Tensors:
        """C of the tensors the type shares; zero before the first round."""
        shared = self.slice(type_key)
        known = self._controls.get(f"type/{type_key}", {})
        return {name: known.get(name, np.zeros_like(value)) for name, value in shared.items()}

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """FedAvg's step; c moves by the clients' changes."""
        type_key = updates[0].type_key
        old = self.controls(type_key)
        count = len(set(self.roster.of_type(type_key)) & set(self.roster.learners))
        new = {name: value.astype(np.float64) for name, value in old.items()}
        for update in updates:
            for name, delta in update.deltas.items():
                new[name] -= (old[name] + delta / update.path_length) / count
        self._controls[group] = {name: value.astype(np.float32) for name, value in new.items()}
        return mean_delta(updates)
