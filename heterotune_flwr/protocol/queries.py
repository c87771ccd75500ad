"""Two of the four messages: who is there, and the public factors of a model type (see :mod:`.messages`)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.data.symbols import MOST_PIECES
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.manifest import MAX_NUMBERS
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.names import LONGEST_LABEL, is_label
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.wire import (
    CONFIG,
    FACTORS,
    read_config,
    read_field,
    read_id,
    read_json,
    read_tensors,
    read_texts,
)

#: Letters of a tensor's name.
_LONGEST_NAME = 500

#: What no description can be beyond: the server divides by these numbers, draws by them, and makes room by them.
_MOST = {
    "hidden": 10**6,
    "layers": 10**5,
    "parameters": 10**14,
    "model_bytes": 10**15,
    "lora16_bytes": 10**15,
    "train_examples": 10**9,
    "personal_examples": 10**9,
    "lowest_slot": 10**5,
    "pieces": MOST_PIECES,
}
_AT_LEAST_ONE = ("hidden", "layers", "parameters", "model_bytes", "lora16_bytes")
#: Labels of a closed set, and tensors that a client trains, at most.
MOST_LABELS, _MOST_TENSORS = 10**4, 1 << 16


def _read_shapes(record: ConfigRecord) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a client would train.

    The server makes first values of these shapes before anything else of the client is checked.
    """
    raw = read_json(record, "shapes")
    sound = isinstance(raw, dict) and len(raw) <= _MOST_TENSORS
    for shape in raw.values() if sound else ():
        sound &= isinstance(shape, list) and all(
            type(size) is int and 0 < size <= MAX_NUMBERS for size in shape
        )
    if not sound or any(len(name) > _LONGEST_NAME or not name.isprintable() for name in raw):
        raise ExchangeError("field 'shapes' of the message is malformed")
    shapes = {name: tuple(shape) for name, shape in raw.items()}
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_NUMBERS:
        raise ExchangeError(
            f"field 'shapes' of the message announces more than {MAX_NUMBERS} numbers"
        )
    return shapes


@dataclass(frozen=True)
class DescribeRequest:
    """Ask a client who it is; ``symbols``: whether the run needs to know about its vocabulary."""

    header: Header
    symbols: bool = False

    def to_content(self) -> RecordDict:
        """Build the message content."""
        config = ConfigRecord({**self.header.to_config(), "symbols": self.symbols})
        return RecordDict({CONFIG: config})

    @classmethod
    def from_content(cls, content: RecordDict) -> DescribeRequest:
        """Read the message content."""
        record = read_config(content)
        return cls(Header.from_config(record), read_field(record, "symbols", bool))


@dataclass(frozen=True)
class DescribeReply:
    """Who a client is.

    ``shapes`` are the canonical names and shapes of the tensors it would train with the request's
    method; ``model_bytes`` is two bytes per backbone parameter and ``lora16_bytes`` the bf16 size
    of LoRA r=16 on all its linear layers (the two denominators of every saving); ``vocabulary``
    and ``pieces`` are the identity of its vocabulary and how many pieces it has (:mod:`..data.symbols`; empty and 0
    where nobody asked); ``labels`` is empty for open text;
    ``lowest_slot`` is the first depth slot it trains.
    """

    client_id: str
    type_key: str
    fingerprint: str
    bits: str
    hidden: int
    layers: int
    parameters: int
    model_bytes: int
    lora16_bytes: int
    train_examples: int
    personal_examples: int
    labels: list[str]
    shapes: dict[str, tuple[int, ...]]
    code_hash: str
    vocabulary: str = ""
    pieces: int = 0
    lowest_slot: int = 0

    def to_content(self) -> RecordDict:
        """Build the message content."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["shapes"] = json.dumps({name: list(shape) for name, shape in self.shapes.items()})
        return RecordDict({CONFIG: ConfigRecord(fields)})

    @classmethod
    def from_content(cls, content: RecordDict) -> DescribeReply:
        """Read the message content."""
        record = read_config(content)
        shapes = _read_shapes(record)
        ids = ("client_id", "type_key", "fingerprint", "bits", "code_hash")
        numbers = (
            "hidden", "layers", "parameters", "model_bytes", "lora16_bytes",
            "train_examples", "personal_examples", "lowest_slot", "pieces",
        )  # fmt: skip
        fields: dict[str, Any] = {key: read_id(record, key) for key in ids}
        fields |= {key: read_field(record, key, int) for key in numbers}
        for key, value in fields.items():
            least = 1 if key in _AT_LEAST_ONE else 0
            if isinstance(value, int) and not least <= value <= _MOST[key]:
                raise ExchangeError(
                    f"field {key!r} of the message is {value}, which no client can have"
                )
        labels = read_texts(record, "labels")
        if len(labels) > MOST_LABELS or len(set(labels)) != len(labels):
            raise ExchangeError(
                f"field 'labels' of the message names an answer twice, or more than {MOST_LABELS}"
            )
        if not all(map(is_label, labels)):
            raise ExchangeError(
                f"field 'labels' of the message has one of over {LONGEST_LABEL} letters, or with control characters"
            )
        return cls(
            **fields,
            labels=labels,
            shapes=shapes,
            vocabulary=read_id(record, "vocabulary", empty=True),
        )


@dataclass(frozen=True)
class AlignRequest:
    """Ask one client of a type for its public factors.

    ``part``: those of ``slots``, or of a view by its name; ``pieces``: what its vocabulary holds. ``symbols`` are those
    of the run, packed (:mod:`..data.symbols`): of ``pieces`` which of them it knows; empty: all of its own. ``anchors``
    is the identity of what is to be read, empty for ``pieces``.
    """

    header: Header
    slots: int
    symbols: bytes = b""
    part: str = "slots"
    anchors: str = ""

    def to_content(self) -> RecordDict:
        """Build the message content."""
        fields: dict[str, Any] = {
            "slots": self.slots,
            "symbols": self.symbols,
            "part": self.part,
            "anchors": self.anchors,
        }
        return RecordDict({CONFIG: ConfigRecord({**self.header.to_config(), **fields})})

    @classmethod
    def from_content(cls, content: RecordDict) -> AlignRequest:
        """Read the message content."""
        record = read_config(content)
        return cls(
            Header.from_config(record),
            read_field(record, "slots", int),
            read_field(record, "symbols", bytes),
            read_field(record, "part", str),
            read_id(record, "anchors", empty=True),
        )


@dataclass(frozen=True)
class AlignReply:
    """Public factors of one model type (see ``dema.factors``)."""

    client_id: str
    type_key: str
    factors: Tensors

    def to_content(self, codec: str) -> RecordDict:
        """Build the message content."""
        config = ConfigRecord({"client_id": self.client_id, "type_key": self.type_key})
        return RecordDict({CONFIG: config, FACTORS: pack(self.factors, codec)})

    @classmethod
    def from_content(cls, content: RecordDict) -> AlignReply:
        """Read the message content."""
        record = read_config(content)
        factors = read_tensors(content, FACTORS)
        if factors is None:
            raise ExchangeError("the reply to query.align has no 'factors' record")
        return cls(read_id(record, "client_id"), read_id(record, "type_key"), factors)
