"""A channel's part of a message: tensors and fields under the channel's name, whoever the channel is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import pack, tensor_digest
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.names import is_id
from heterotune_flwr.protocol.wire import read_json, read_tensors

Array = NDArray[np.float32]
#: Before a channel's name, in the configuration and among the records of a message.
_PREFIX = "channel."
#: Channels of one message.
_MOST = 32


@dataclass(frozen=True)
class Payload:
    """What one half of a channel tells the other in one message.

    Attributes
    ----------
    tensors
        By name; float32.
    fields
        Whatever JSON can say; the other half checks every one of them.
    codec
        How the tensors travel (:mod:`...exchange.codecs`).
    effort
        Which messages take equally long: same channels, same efforts. It does not travel.

    """

    tensors: Mapping[str, Array] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    codec: str = "bf16"
    effort: str = ""

    @property
    def digest(self) -> str:
        """Identity of tensors and fields (hex)."""
        text = tensor_digest(self.tensors) + json.dumps(self.fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def add_payloads(
    content: RecordDict, config: ConfigRecord, payloads: Mapping[str, Payload]
) -> None:
    """Add payloads to a message under construction."""
    for name, payload in payloads.items():
        config[_PREFIX + name] = json.dumps(dict(payload.fields), separators=(",", ":"))
        if payload.tensors:
            content[_PREFIX + name] = pack(payload.tensors, payload.codec)


def read_payloads(
    content: RecordDict, config: ConfigRecord, asked: Collection[str] | None = None
) -> dict[str, Payload]:
    """Read the payloads of a message as they came (ExchangeError: malformed, or of a channel not among ``asked``)."""
    names = [str(key).removeprefix(_PREFIX) for key in config if str(key).startswith(_PREFIX)]
    records = [str(key).removeprefix(_PREFIX) for key in content if str(key).startswith(_PREFIX)]
    if len(names) > _MOST or not all(map(is_id, names)) or not set(records) <= set(names):
        raise ExchangeError("the message's channels are malformed")
    if asked is not None and (further := sorted(set(names) - set(asked))):
        raise ExchangeError(f"answers for channel {further[0]!r}, which was not asked")
    found = {}
    for name in sorted(names):
        fields = read_json(config, _PREFIX + name)
        if not isinstance(fields, dict):
            raise ExchangeError(f"what the message says to channel {name!r} is no JSON object")
        found[name] = Payload(read_tensors(content, _PREFIX + name) or {}, fields)
    return found
