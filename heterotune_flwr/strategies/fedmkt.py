"""FedMKT-style transfer: clients of different models learn from each other's predictions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.strategies.lora_family import LoRAStrategy
from heterotune_flwr.strategies.strategy import Scope


class FedMKT(LoRAStrategy):
    """After FedMKT (arXiv 2406.02224): mutual transfer of predictions on a public set between different models.

    Every client keeps a LoRA of its own, which never travels; after local training it predicts on the round's public
    texts, the server averages, and everybody fits the mean beside its own examples in the next round.

    Differs from the paper: its public set is labelled, and each text is taught by whoever fits its label best; ours
    (the anchors) has no labels, so predictions are averaged (as in FedMD, arXiv 1910.03581). Vocabularies are matched
    by the task's label words, on open text by pieces they have in common, instead of by aligning tokens, and the server
    has no model of its own. What is averaged, and how, is as in HeteroTune. Heterogeneity: any model types, any bits.
    """

    needs_teacher = True

    @classmethod
    def channel_entries(cls, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """Predictions, unless the entry has them otherwise."""
        return {"predictions": {}, **entries}

    def scope(self, name: str, type_key: str) -> Scope:
        """No tensor is shared."""
        return "client"
