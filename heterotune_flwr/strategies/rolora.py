"""RoLoRA: B and A are trained and averaged in turn."""

from __future__ import annotations

from collections.abc import Collection

from heterotune_flwr.strategies.lora_family import LoRAStrategy, layers


class RoLoRA(LoRAStrategy):
    """RoLoRA (arXiv 2502.01755): odd rounds train B with A held, even rounds A with B held.

    In every round the other factor is the same for all clients of a type, so that averaging is exact
    as with FFA-LoRA, but A learns too. Up travels the trained half only. Heterogeneity: any model types (each a
    federation of its own), any bits; one rank.
    """

    def frozen(self, type_key: str, server_round: int) -> Collection[str]:
        """The factor whose turn it is not."""
        pairs = layers(self.roster.shapes(type_key))
        return [(a if server_round % 2 else b) for _, a, b in pairs]
