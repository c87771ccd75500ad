"""The server's control variate, for SCAFFOLD (arXiv 1910.06378, option II), one for each model type.

It moves by the mean change of the clients' own over *all* clients of the type that train. The server can tell that
change from a client's update, so nothing more travels up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.channels.channel import (
    Aggregated,
    Purposes,
    RunFacts,
    ServerChannel,
    Update,
)
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.payloads import Payload


class ControlVariates(ServerChannel):
    """The server's half; it has no options: ``control_variates: {}``."""

    @classmethod
    def read(cls, given: Any) -> dict[str, Any]:
        """Nothing can be chosen."""
        if given != {}:
            raise ConfigError(f"control_variates is {given!r}; it has no options: {{}} is needed")
        return {}

    def open(self, run: RunFacts) -> str | None:
        """Begin at zero."""
        self.run = run
        self._known: dict[str, Tensors] = {}
        return None

    def control(self, type_key: str) -> Tensors:
        """``c`` of the tensors that clients of a type share."""
        known = self._known.get(type_key, {})
        shared = self.run.shared(type_key)
        return {name: known.get(name, np.zeros_like(value)) for name, value in shared.items()}

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """Bring ``c`` where a client trains."""
        if "train" not in purposes:
            return None
        codec = exact_codec(self.run.config.exchange)
        return Payload(self.control(self.run.clients[client_id].type_key), codec=codec)

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Move ``c`` by the clients' changes, ``-(c + delta / path length)`` each."""
        infos = self.run.clients.values()
        for key in self.run.type_keys:
            mine = [update for update in updates if update.type_key == key]
            if not mine:
                continue
            count = sum(info.type_key == key and info.train_examples > 0 for info in infos)
            old = self.control(key)
            new = {name: value.astype(np.float64) for name, value in old.items()}
            for update in mine:
                for name, delta in update.deltas.items():
                    new[name] -= (old[name] + delta / update.path_length) / count
            self._known[key] = {name: value.astype(np.float32) for name, value in new.items()}
        return Aggregated()

    def state_dict(self) -> State:
        """``c`` of every type."""
        return {"known": self._known}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self._known = dict(state["known"])


Channel = ControlVariates
