"""FLoRA: the clients' LoRA modules are stacked, and merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from heterotune_flwr.dema.bank import RESIDUAL
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.lora_family import (
    RankedLoRAStrategy,
    ResidualLoRAStrategy,
    layers,
    shares,
)


class FLoRA(RankedLoRAStrategy, ResidualLoRAStrategy):
    """FLoRA (arXiv 2409.05976): aggregation by stacking.

    ``[B_1 ... B_N] [p_1 A_1; ...; p_N A_N] = sum_i p_i B_i A_i``: without noise for any mixture of ranks. The
    sum goes into the weights, and every round starts with new LoRA (B = 0; A at its first value). Heterogeneity:
    any model types (each a federation of its own), any ranks (``ranks``); *no quantized backbones*
    (:class:`.lora_family.ResidualLoRAStrategy` says why).
    """

    def __init__(self, context: StrategyContext, ranks: Sequence[int] | None = None) -> None:
        super().__init__(context, ranks)

    @classmethod
    def check_types(cls, bits: Mapping[str, str]) -> None:
        """Refuse quantized backbones."""
        ResidualLoRAStrategy.check_types.__func__(cls, bits)  # type: ignore[attr-defined]

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Stack, merge; the factors stay where they began."""
        values, weights = self.trained(updates), shares(updates)
        step: Tensors = {}
        for layer, a, b in layers(self.state[group]):
            down = np.concatenate(
                [p * v[a].astype(np.float64) for p, v in zip(weights, values, strict=True)]
            )
            up = np.concatenate([v[b].astype(np.float64) for v in values], axis=1)
            step[layer + RESIDUAL] = (self.scale * up @ down).astype(np.float32)
        return step
