"""What a strategy remembers about its clients' behaviour, in one place to save and restore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.exchange.codecs import find_codec
from heterotune_flwr.exchange.directions import up_codec
from heterotune_flwr.federation.cooldown import Cooldowns
from heterotune_flwr.federation.deadlines import ReplyTimes
from heterotune_flwr.federation.update_gate import UpdateGate
from heterotune_flwr.schema import ExchangeConfig, ServerConfig


@dataclass
class Safety:
    """The update gate, the cooldown list and the measured reply times of one strategy and seed.

    ``gate`` and ``cooldown`` decide results and know no clock: restored, they go on bit for bit as the saved ones would
    have. ``times`` decides nothing but deadlines.
    """

    gate: UpdateGate
    cooldown: Cooldowns
    times: ReplyTimes

    @classmethod
    def of(cls, server: ServerConfig, exchange: ExchangeConfig) -> Safety:
        """As a run's ``server`` section says, with no past.

        Where only a share k of the numbers travels and the rest is kept for later rounds, a number that is sent at last
        brings up to 1 / k rounds: an honest update can be 1 / sqrt(k) times as long, and so is the ceiling.
        """
        ceiling = server.norm_ceiling
        if ceiling is not None and getattr(find_codec(up_codec(exchange)), "sparse", False):
            ceiling /= math.sqrt(exchange.top_k)
        return cls(
            UpdateGate(server.norm_limit, ceiling),
            Cooldowns(server.cooldown_after, server.cooldown_longest, server.min_results),
            ReplyTimes(
                server.timeout_seconds, server.deadline_floor_seconds, server.deadline_factor
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """All three as one JSON-able dictionary."""
        return {
            "gate": self.gate.state_dict(),
            "cooldown": self.cooldown.state_dict(),
            "times": self.times.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], warm: bool = False) -> None:
        """Take over what :meth:`state_dict` gave; ``warm``: the clients' processes still run (:class:`ReplyTimes`)."""
        self.gate.load_state_dict(state["gate"])
        self.cooldown.load_state_dict(state["cooldown"])
        self.times.load_state_dict(state["times"], warm)
