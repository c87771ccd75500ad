"""FedEx-LoRA: what averaging the factors leaves out is added to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.dema.bank import RESIDUAL
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.lora_family import (
    Matrix,
    ResidualLoRAStrategy,
    layers,
    product,
    shares,
)


class FedExLoRA(ResidualLoRAStrategy):
    """FedEx-LoRA (arXiv 2410.09432): FedIT's averages, plus the exact residual in the frozen weights.

    ``A <- sum_i p_i A_i``, ``B <- sum_i p_i B_i``, ``W <- W + scale (sum_i p_i B_i A_i - B A)``: the model after
    aggregation is exactly the mean of the clients' models. Heterogeneity: any model types (each a federation of its
    own), one rank; *no quantized backbones* (:class:`.lora_family.ResidualLoRAStrategy` says why).
    """

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Mean factors, and the residual of their product."""
        state, values, weights = self.state[group], self.trained(updates), shares(updates)
        step: Tensors = {}
        for layer, a, b in layers(state):
            mean = {name: _mean(weights, [value[name] for value in values]) for name in (a, b)}
            exact = _mean(weights, [product(value, a, b) for value in values])
            step |= {name: (mean[name] - state[name]).astype(np.float32) for name in (a, b)}
            step[layer + RESIDUAL] = (self.scale * (exact - mean[b] @ mean[a])).astype(np.float32)
        return step


def _mean(weights: Sequence[float], values: Sequence[NDArray[Any]]) -> Matrix:
    total = np.zeros(values[0].shape)
    for weight, value in zip(weights, values, strict=True):
        total += weight * value
    return total
