"""Every byte between server and clients, against LoRA r=16 and the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from heterotune_flwr.exchange.packing import content_bytes, payload_bytes
from heterotune_flwr.flower import ArrayRecord, RecordDict, content_to_bytes
from heterotune_flwr.protocol.wire import MAPS


@dataclass(frozen=True)
class Exchanged:
    """One request and its reply, in bytes.

    Attributes
    ----------
    down, up
        Logical size of the contents: arrays, configuration, metrics with their keys.
    maps
        Of ``down``: the frozen maps, sent once.
    wire_down, wire_up
        The contents as Flower serialises them (protobuf), without its envelope and the transport's.

    """

    down: int
    up: int
    maps: int = 0
    wire_down: int = 0
    wire_up: int = 0

    @classmethod
    def of(cls, request: RecordDict, reply: RecordDict) -> Exchanged:
        """Count a request's and a reply's content."""
        record = request.get(MAPS)
        return cls(
            content_bytes(request),
            content_bytes(reply),
            payload_bytes(record) if isinstance(record, ArrayRecord) else 0,
            _wire_bytes(request),
            _wire_bytes(reply),
        )


def _wire_bytes(content: RecordDict) -> int:
    """Serialised size; of what cannot have come over a wire (a shape no message can say), its logical one."""
    try:
        return len(content_to_bytes(content))
    except (ValueError, TypeError, OverflowError):
        return content_bytes(content)


@dataclass
class Ledger:
    """Bytes of message contents per direction and purpose; every single message is in the journal (``bytes``).

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
    wire_up: int = 0
    wire_down: int = 0
    client_rounds: int = 0
    by_client: dict[str, int] = field(default_factory=dict)
    by_type: dict[str, dict[str, int]] = field(default_factory=dict)

    def train(self, client_id: str, type_key: str, one: Exchanged) -> None:
        """One client's training round."""
        down = one.down - one.maps
        self.train_down += down
        self.train_up += one.up
        self.client_rounds += 1
        _add(
            self.by_type.setdefault(type_key, {}), {"up": one.up, "down": down, "client_rounds": 1}
        )
        self._common(client_id, one, one.maps)

    def evaluate(self, client_id: str, one: Exchanged) -> None:
        """One client's evaluation."""
        self.evaluate_down += one.down - one.maps
        self.evaluate_up += one.up
        self._common(client_id, one, one.maps)

    def one_time(self, client_id: str, down: int, up: int) -> None:
        """A query."""
        self.one_time_up += up
        self._common(client_id, Exchanged(down, up), down)

    def _common(self, client_id: str, one: Exchanged, one_time_down: int) -> None:
        self.one_time_down += one_time_down
        self.wire_down += one.wire_down
        self.wire_up += one.wire_up
        _add(self.by_client, {client_id: one.down + one.up})

    def state_dict(self) -> dict[str, Any]:
        """Everything counted, for a checkpoint."""
        return asdict(self)

    def add(self, memory: Mapping[str, Any]) -> None:
        """Add what an earlier start of the same run has counted."""
        for name, value in memory.items():
            if name == "by_type":
                for type_key, counts in value.items():
                    _add(self.by_type.setdefault(type_key, {}), counts)
            elif name == "by_client":
                _add(self.by_client, value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def summary(
        self, lora16: Mapping[str, float], model: Mapping[str, float], clients: Mapping[str, int]
    ) -> dict[str, Any]:
        """Return the ``bytes`` entry of results.json.

        Parameters
        ----------
        lora16, model
            Per type, what one way of LoRA r=16 (bf16, all linear layers) and of the whole model (two
            bytes a parameter) would take.
        clients
            Clients per type: the overall denominators are means over clients.

        """
        total = max(sum(clients.values()), 1)
        lora = sum(lora16[key] * count for key, count in clients.items()) / total
        whole = sum(model[key] * count for key, count in clients.items()) / total
        names = (
            "one_time_up", "one_time_down", "evaluate_up", "evaluate_down", "train_up", "train_down",
            "wire_up", "wire_down", "client_rounds",
        )  # fmt: skip
        return {
            **_against(self.train_up, self.train_down, self.client_rounds, lora, whole),
            **{name: getattr(self, name) for name in names},
            "types": {
                key: _against(
                    counts["up"], counts["down"], counts["client_rounds"], lora16[key], model[key]
                )
                for key, counts in sorted(self.by_type.items())
                if key in lora16
            },
        }


def _against(
    up: int, down: int, rounds: int, lora16: float, model: float
) -> dict[str, float | None]:
    """Bytes of a client and round, and what is saved of the two denominators."""
    each = up / max(rounds, 1)
    return {
        "up_per_client_round": each,
        "down_per_client_round": down / max(rounds, 1),
        "lora16_bytes": lora16,
        "model_bytes": model,
        "saved_vs_lora16": 1 - each / lora16 if lora16 else None,
        "saved_vs_model": 1 - each / model if model else None,
    }


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for key, value in more.items():
        counts[key] = counts.get(key, 0) + value
