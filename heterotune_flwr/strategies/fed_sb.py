"""Fed-SB: a small core between frozen factors."""

from __future__ import annotations

from dataclasses import replace

from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.strategies.lora_family import LoRAStrategy


class FedSB(LoRAStrategy):
    """Fed-SB (arXiv 2502.15436): ``W + scale B R A`` with A, B frozen; the r x r cores R are averaged.

    With A and B the same for all clients of a type, the mean of the cores is exactly the mean of the changes, and
    what travels (r^2 numbers per layer) does not depend on the layer's size. A and B are the leading singular vectors
    of the layer's own weight, computed by every client alone (LoRA-XS, arXiv 2405.17604); the paper takes those of
    the first full gradient instead, which would cost one message of the model's size. Heterogeneity: any model types
    (each a federation of its own), any bits; one rank.
    """

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self.method = replace(self.method, lora_core=True)
