"""FedIT: example-weighted averaging of LoRA, inside each model type."""

from __future__ import annotations

from heterotune_flwr.strategies.lora_family import LoRAStrategy


class FedIT(LoRAStrategy):
    """FedIT (arXiv 2305.05644): FedAvg of the LoRA factors A and B of all linear layers.

    ``A <- sum_i n_i A_i / n`` and ``B <- sum_i n_i B_i / n`` separately. LoRA factors of different
    backbones have different shapes, so each model type is a federation of its own here. Needs
    ``method.kind=lora`` (conf/strategy/fedit.yaml sets it). Heterogeneity: any model types, any bits; one rank.
    """
