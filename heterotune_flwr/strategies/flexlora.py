"""FlexLoRA: the clients' full changes are averaged, and factored again by SVD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.strategies.lora_family import RankedLoRAStrategy, layers, product, shares


class FlexLoRA(RankedLoRAStrategy):
    """FlexLoRA (arXiv 2402.11505): ``sum_i p_i B_i A_i = U S V'``, ``B <- U sqrt(S)``, ``A <- sqrt(S) V'``.

    Every client gets the leading components of its own rank, the best approximation of the mean change it can hold.
    Where the mean change has fewer components than the largest rank, the rest of A keeps its first values and B
    is zero there, so that it can grow. Heterogeneity: any model types (each a federation of its own), any bits,
    any ranks (``ranks``).
    """

    own_server_step = "replaces its factors by an SVD, which a server optimizer would break"

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Average the products, factor, truncate to the largest rank."""
        state, values, weights = self.state[group], self.trained(updates), shares(updates)
        step: Tensors = {}
        for _, a, b in layers(state):
            mean = sum(p * product(v, a, b) for p, v in zip(weights, values, strict=True))
            left, sizes, right = np.linalg.svd(np.asarray(mean), full_matrices=False)
            kept = int(np.sum(sizes[: self.method.lora_rank] > 1e-10 * max(sizes[0], 1e-30)))
            roots = np.sqrt(sizes[:kept])
            new_a, new_b = (
                self.groups.first_values(group)[a].astype(np.float64),
                np.zeros(state[b].shape),
            )
            new_a[:kept] = roots[:, None] * right[:kept]
            new_b[:, :kept] = left[:, :kept] * roots
            step[a] = (new_a - state[a]).astype(np.float32)
            step[b] = (new_b - state[b]).astype(np.float32)
        return step
