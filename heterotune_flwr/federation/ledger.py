"""Every byte between server and clients, against LoRA r=16 and the model itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Bytes of message contents (arrays, configuration, metrics), per direction and purpose.

    Recurring bytes are those of ``train`` messages without the maps they may bring; one-time bytes
    are ``query.describe``, ``query.align`` and the maps. Evaluation is counted apart: how often
    one evaluates is not the method's.
    """

    train_up: int = 0
    train_down: int = 0
    one_time_up: int = 0
    one_time_down: int = 0
    evaluate_up: int = 0
    evaluate_down: int = 0
    client_rounds: int = 0
    by_client: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def train(self, client_id: str, down: int, up: int, maps: int = 0) -> None:
        """One client's training round: bytes down (``maps`` of them one-time) and up."""
        self.train_down += down - maps
        self.train_up += up
        self.one_time_down += maps
        self.client_rounds += 1
        self.by_client[client_id] += down + up

    def evaluate(self, client_id: str, down: int, up: int, maps: int = 0) -> None:
        """One client's evaluation."""
        self.evaluate_down += down - maps
        self.evaluate_up += up
        self.one_time_down += maps
        self.by_client[client_id] += down + up

    def one_time(self, client_id: str, down: int, up: int) -> None:
        """A query."""
        self.one_time_down += down
        self.one_time_up += up
        self.by_client[client_id] += down + up

    def summary(self, lora16_bytes: float, model_bytes: float) -> dict[str, Any]:
        """Return the ``bytes`` entry of results.json.

        Parameters
        ----------
        lora16_bytes, model_bytes
            Mean over the clients of what one way of LoRA r=16 (bf16, all linear layers) and of
            the whole model (two bytes a parameter) would take.

        """
        rounds = max(self.client_rounds, 1)
        up, down = self.train_up / rounds, self.train_down / rounds
        return {
            "up_per_client_round": up,
            "down_per_client_round": down,
            "one_time_up": self.one_time_up,
            "one_time_down": self.one_time_down,
            "evaluate_up": self.evaluate_up,
            "evaluate_down": self.evaluate_down,
            "train_up": self.train_up,
            "train_down": self.train_down,
            "client_rounds": self.client_rounds,
            "lora16_bytes": lora16_bytes,
            "model_bytes": model_bytes,
            "saved_vs_lora16": 1 - up / lora16_bytes if lora16_bytes else None,
            "saved_vs_model": 1 - up / model_bytes if model_bytes else None,
        }
