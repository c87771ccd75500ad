"""What thousands of virtual clients need of the server, and real nodes do not: few messages under way at a time.

Flower's simulation (seen in 1.41) looks for messages node by node, ten times a second, and for every node through all
messages that are stored: quadratic, and in the server's own process. With a thousand clients asked at once that took
three quarters of a core. Here only some messages are under way, whoever is asked (:func:`most_in_flight`), and a node
without a message costs one look into a set (:func:`mend_poll`).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from typing import Any

from heterotune_flwr.flower import Grid

log = logging.getLogger(__name__)

_SIMULATION = "flwr.simulation.run_simulation"
_MODULE, _STATE, _METHOD, _STORE = (
    "flwr.server.superlink.linkstate.in_memory_linkstate",
    "InMemoryLinkState",
    "get_message_ins",
    "message_ins_store",
)
#: Seconds for which it is believed which nodes have a message waiting; Flower looks every 0.1 s.
_BELIEVED = 0.02
#: Messages under way per core, and at least: workers must find the next one while Flower sleeps between two looks.
_PER_CORE, _LEAST = 8, 16


def in_simulation() -> bool:
    """Whether this process is the server of a Flower simulation."""
    return _SIMULATION in sys.modules


def most_in_flight(grid: Grid) -> int | None:
    """Messages that may be under way at a time; None: all at once, as for real nodes.

    A grid may say so itself (``most_in_flight``).
    """
    if hasattr(grid, "most_in_flight"):
        given: int | None = grid.most_in_flight
        return given
    return max(_LEAST, _PER_CORE * (os.cpu_count() or 1)) if in_simulation() else None


def mend_poll() -> bool:
    """Look for a node's messages only where it has any; False where this is no simulation, or Flower has changed."""
    if not in_simulation():
        return False
    kind = getattr(importlib.import_module(_MODULE), _STATE, None)
    method = getattr(kind, _METHOD, None)
    if method is None:
        log.warning("Flower's store of messages has changed: thousands of clients will be slow")
        return False
    if getattr(method, "mended", False):
        return True

    def get_message_ins(self: Any, node_id: int, *args: Any, **kwargs: Any) -> Any:
        return method(self, node_id, *args, **kwargs) if _may_have(self, node_id) else []

    get_message_ins.mended = True  # type: ignore[attr-defined]
    setattr(kind, _METHOD, get_message_ins)
    return True


def _may_have(state: Any, node_id: int) -> bool:
    """Whether a message for a node was waiting a moment ago; True where Flower's store is not as we know it."""
    now = time.monotonic()
    at, nodes = state.__dict__.get("_heterotune_waiting", (-1.0, frozenset()))
    if now - at > _BELIEVED:
        try:
            stored = list(getattr(state, _STORE).values())
            nodes = {m.metadata.dst_node_id for m in stored if m.metadata.delivered_at == ""}
        except (AttributeError, RuntimeError):
            return True
        state._heterotune_waiting = (now, nodes)
    return node_id in nodes
