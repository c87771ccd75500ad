"""What a client still holds is named in a request instead of being sent again: the words of it, for both sides.

A held tensor counts only bit for bit: each has a key, SHA-256 over its name, shape and decoded float32 bytes, and one
digest stands for any set of them. The server's half is :mod:`..federation.resend`, the client's
:mod:`..client.received`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.protocol.wire import read_field, read_id, read_texts

_NAMES, _DIGEST = "cached", "cached_digest"
#: Field of a reply: digest of all tensors the client now holds.
CACHE_DIGEST = "cache_digest"


@dataclass(frozen=True)
class CachedRef:
    """Tensors a request names instead of carrying them.

    Attributes
    ----------
    names
        Sorted.
    digest
        Of their keys (:func:`joint_digest`); empty where there are none.

    """

    names: list[str] = field(default_factory=list)
    digest: str = ""

    def to_config(self) -> dict[str, Any]:
        """Fields of the ``config`` record; none where nothing is held."""
        return {_NAMES: self.names, _DIGEST: self.digest} if self.names else {}

    @classmethod
    def from_config(cls, record: Mapping[str, Any]) -> CachedRef:
        """Read the fields of a request (ExchangeError where they are malformed)."""
        if _NAMES not in record:
            return cls()
        names = read_texts(record, _NAMES)
        if not names or sorted(set(names)) != names:
            raise ExchangeError("field 'cached' of the message must name tensors once, in order")
        return cls(names, read_field(record, _DIGEST, str))


def tensor_keys(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
    """Name -> key of the tensor's exact value (hex)."""
    return {name: tensor_digest({name: value}) for name, value in tensors.items()}


def joint_digest(keys: Mapping[str, str]) -> str:
    """One digest for a set of tensors, from their keys (hex)."""
    text = "\n".join(f"{keys[name]} {name}" for name in sorted(keys))
    return hashlib.sha256(text.encode()).hexdigest()


def read_cache_digest(record: Mapping[str, Any]) -> str:
    """What a reply says is kept; empty where it says nothing."""
    return read_id(record, CACHE_DIGEST, empty=True) if CACHE_DIGEST in record else ""
