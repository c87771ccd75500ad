"""HETLoRA: LoRA of different ranks, truncated down and padded with zeros up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heterotune_flwr.cmga.pull import no_heavier
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.lora_family import RankedLoRAStrategy, layers, product


class HETLoRA(RankedLoRAStrategy):
    """HETLoRA (arXiv 2401.06432): zero-padded factors, weighed by the size of each client's change.

    A client of rank r trains the first r components. Its factors are padded with zeros and averaged with weights
    ``|B_i A_i|_F / sum_j |B_j A_j|_F``, the norms taken over all layers (the paper's sparsity-weighted aggregation),
    none above one and a quarter times the median one.
    The paper's pruning of a client's rank during training is not part of this. Heterogeneity: any model types
    (each a federation of its own), any bits, any ranks (``ranks``).
    """

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Pad, weigh, average."""
        state, values = self.state[group], self.trained(updates)
        squares = [
            sum(float(np.sum(product(value, a, b) ** 2)) for _, a, b in layers(value))
            for value in values
        ]
        norms = no_heavier(np.sqrt(squares))
        weights = norms / norms.sum() if norms.sum() > 0 else np.full(len(norms), 1 / len(norms))
        step: Tensors = {}
        for name, old in state.items():
            mean = np.zeros(old.shape)
            for weight, value in zip(weights, values, strict=True):
                rows, columns = value[name].shape
                mean[:rows, :columns] += weight * value[name]
            step[name] = (mean - old).astype(np.float32)
        return step
