"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate, mean_delta
from heterotune_flwr.strategies.within_type import WithinType


class Scaffold(WithinType):
    """SCAFFOLD (arXiv 1910.06378, option II) on the bank, inside each model type.

    FedAvg with the channel :mod:`..channels.control_variates`: a client adds ``c - c_i`` to every gradient. Nothing
    more travels up; c travels down beside the bank. Derived for SGD: ``train.optimizer`` must be ``sgd``
    (conf/strategy/scaffold.yaml sets it). Heterogeneity: any model types (each a federation of its own), any bits.
    """

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        if self.config.train.optimizer != "sgd":
            raise ConfigError(
                f"strategy {context.name}: SCAFFOLD's correction is a gradient's, which AdamW rescales; "
                f"set strategies.{context.name}.train.optimizer=sgd"
            )

    @classmethod
    def channel_entries(cls, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """Control variates besides."""
        return {**super().channel_entries(entries), "control_variates": {}}

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """FedAvg's step; the control variates follow it, so no robust mean can take its place."""
        return mean_delta(updates)
