"""The server's half of sending only what changed: what each client confirmed to hold (see :mod:`..protocol.cached`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from heterotune_flwr.exchange.directions import down_codec
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.protocol.cached import CachedRef, joint_digest, tensor_keys
from heterotune_flwr.protocol.messages import EvaluateRequest, TrainRequest
from heterotune_flwr.schema import ExchangeConfig

Request = TypeVar("Request", bound=TrainRequest | EvaluateRequest)


class Resend:
    """What clients hold, as their last replies confirmed it. Not saved: after a restart everything is sent once."""

    def __init__(self, exchange: ExchangeConfig) -> None:
        self._codec = down_codec(exchange)
        self._active = exchange.resend == "changed"
        self._sent: dict[str, dict[str, str]] = {}
        self._held: dict[str, dict[str, str]] = {}

    def without_held(self, client_id: str, request: Request) -> Request:
        """Name the tensors the client holds bit for bit (after the codec) instead of carrying them.

        Until the client answers, nothing counts as held: it may have replaced what it had.
        """
        if not self._active or not request.tensors:
            return request
        keys = tensor_keys(round_trip(request.tensors, self._codec))
        known = self._held.pop(client_id, {})
        self._sent[client_id] = keys
        same = sorted(name for name, key in keys.items() if known.get(name) == key)
        if not same:
            return request
        tensors = {name: value for name, value in request.tensors.items() if name not in same}
        held = CachedRef(same, joint_digest({name: keys[name] for name in same}))
        return replace(request, tensors=tensors, cached=held)

    def confirm(self, client_id: str, kept: str) -> None:
        """Note a reply's digest of what the client now holds."""
        sent = self._sent.pop(client_id, None)
        if kept and sent is not None and kept == joint_digest(sent):
            self._held[client_id] = sent
