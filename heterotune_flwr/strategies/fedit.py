"""FedIT: example-weighted averaging of LoRA, inside each model type."""

from __future__ import annotations

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.strategies.base import HeteroStrategy, Scope


class FedIT(HeteroStrategy):
    """FedIT (arXiv 2305.05644): FedAvg of the LoRA factors A and B of all linear layers.

    ``A <- sum_i n_i A_i / n`` and ``B <- sum_i n_i B_i / n`` separately. LoRA factors of different
    backbones have different shapes, so each model type is a federation of its own here. Needs
    ``method.kind=lora`` (conf/strategy/fedit.yaml sets it).
    """

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        if self.method.kind != "lora":
            raise ConfigError(
                f"strategy {context.name} averages LoRA but method.kind is {self.method.kind!r}; "
                f"set strategies.{context.name}.method.kind=lora"
            )

    def scope(self, name: str, type_key: str) -> Scope:
        """Share with the own type only."""
        return "type"
