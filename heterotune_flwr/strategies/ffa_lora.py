"""FFA-LoRA: only B is trained and averaged."""

from __future__ import annotations

from heterotune_flwr.strategies.lora_family import LoRAStrategy
from heterotune_flwr.strategies.strategy import Scope


class FFALoRA(LoRAStrategy):
    """FFA-LoRA (arXiv 2403.12313): A stays at its first random value, B is trained and averaged.

    With one A, ``(sum_i n_i B_i / n) A`` is exactly the mean of the clients' changes, which FedIT's
    product of means is not; half of LoRA's bytes. A is the same function of the run's seed everywhere and never
    travels. Heterogeneity: any model types (each a federation of its own), any bits; one rank.
    """

    def scope(self, name: str, type_key: str) -> Scope:
        """Hold A fixed, share B inside the type."""
        return "fixed" if name.endswith(".A") else "type"
