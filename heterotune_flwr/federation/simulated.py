"""What Flower's simulation (seen in 1.41) needs of a server with thousands of clients, and real nodes do not.

*Few messages under way.* The simulation looks for messages node by node, ten times a second, and for every node through
all messages that are stored: quadratic, and in the server's own process. With a thousand clients asked at once that
took three quarters of a core. Here only some messages are under way, whoever is asked (:func:`most_in_flight`), and a
node without a message costs one look into a set (:func:`mend_poll`).

*Another number of nodes.* Flower makes two unless told otherwise, all in one go. So a run need not wait for more of
them, and says at once how many it needs (:func:`check_size`).

*Dead workers.* When a Ray actor dies (out of memory, SIGKILL), Flower puts it back among the idle ones. It then answers
whatever it is given with an error at once, and so takes most of the messages that follow. With :func:`mend_actor_pool`
the pool gets a fresh actor instead. The message that was lost is sent once more by the server
(:meth:`.transport.Transport.collect`). ``tests/federation/test_ray_pool.py`` watches that Flower still works like that.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from heterotune_flwr.errors import FederationError
from heterotune_flwr.flower import Grid

log = logging.getLogger(__name__)

_SIMULATION = "flwr.simulation.run_simulation"
_LINKSTATE = "flwr.server.superlink.linkstate.in_memory_linkstate"
_ACTORS = "flwr.simulation.ray_transport.ray_actor"
_ATTRIBUTES = ("_future_to_actor", "pool", "create_actor_fn")
#: Seconds for which it is believed which nodes have a message waiting; Flower looks every 0.1 s.
_BELIEVED = 0.02
#: Messages under way per core, and at least: workers must find the next one while Flower sleeps between two looks.
_PER_CORE, _LEAST = 8, 16
#: Seconds without a new node after which a simulation has all of its nodes: even thousands are made faster.
ALL_MADE_SECONDS = 3.0


def in_simulation() -> bool:
    """Whether this process is the server of a Flower simulation."""
    return _SIMULATION in sys.modules


def check_size(grid: Grid, clients: int, patience: float) -> None:
    """Check that a simulation has a node for every client of a run (FederationError); waits a moment for the last.

    ``patience``: seconds to wait for the first node.
    """
    began = grew = time.monotonic()
    known = 0
    while (found := len(set(grid.get_node_ids()))) != clients:
        now = time.monotonic()
        if found > known:
            known, grew = found, now
        if now - grew > ALL_MADE_SECONDS if known else now - began > patience:
            raise FederationError(
                f"the simulation has {found} nodes, but the types of this run have {clients} clients: set "
                f"num-supernodes={clients} (flwr run --federation-config), or change types.*.clients"
            )
        time.sleep(0.1)


def most_in_flight(grid: Grid) -> int | None:
    """Messages that may be under way at a time; None: all at once, as for real nodes.

    A grid may say so itself (``most_in_flight``).
    """
    if hasattr(grid, "most_in_flight"):
        given: int | None = grid.most_in_flight
        return given
    return max(_LEAST, _PER_CORE * (os.cpu_count() or 1)) if in_simulation() else None


def _mend(
    module: str, kind: str, method: str, remedy: Callable[[Any], Any], otherwise: str
) -> bool:
    """Put a remedy in the place of a method of Flower's, once; False where there is no such method."""
    owner = getattr(importlib.import_module(module), kind, None)
    before = getattr(owner, method, None)
    if before is None:
        log.warning("Flower's %s has changed: %s", kind, otherwise)
        return False
    if not getattr(before, "mended", False):
        after = remedy(before)
        after.mended = True
        setattr(owner, method, after)
    return True


def mend_poll() -> bool:
    """Look for a node's messages only where it has any; False where this is no simulation, or Flower has changed."""

    def remedy(method: Any) -> Any:
        def get_message_ins(self: Any, node_id: int, *args: Any, **kwargs: Any) -> Any:
            return method(self, node_id, *args, **kwargs) if _may_have(self, node_id) else []

        return get_message_ins

    return in_simulation() and _mend(
        _LINKSTATE, "InMemoryLinkState", "get_message_ins", remedy, "thousands of clients will be slow"
    )  # fmt: skip


def _may_have(state: Any, node_id: int) -> bool:
    """Whether a message for a node was waiting a moment ago; True where Flower's store is not as we know it."""
    now = time.monotonic()
    at, nodes = state.__dict__.get("_heterotune_waiting", (-1.0, frozenset()))
    if now - at > _BELIEVED:
        try:
            stored = list(state.message_ins_store.values())
            nodes = {m.metadata.dst_node_id for m in stored if m.metadata.delivered_at == ""}
        except (AttributeError, RuntimeError):
            return True
        state._heterotune_waiting = (now, nodes)
    return node_id in nodes


def mend_actor_pool() -> bool:
    """Replace dead actors from now on; False where this process runs no simulation, or Flower has changed."""

    def remedy(method: Any) -> Any:
        def add_actor_back_to_pool(self: Any, future: Any) -> None:
            from ray.exceptions import RayActorError

            # Flower calls it while it handles the error that ended the actor.
            died = isinstance(sys.exc_info()[1], RayActorError)
            if not died or any(not hasattr(self, name) for name in _ATTRIBUTES):
                method(self, future)
                return
            self._future_to_actor.pop(future)
            self.pool.append(self.create_actor_fn())
            log.warning("a simulation worker died; another one takes its place")

        return add_actor_back_to_pool

    # The server begins before Flower has loaded the actors.
    return bool({_SIMULATION, _ACTORS} & set(sys.modules)) and _mend(
        _ACTORS, "BasicActorPool", "add_actor_back_to_pool", remedy,
        "a worker that dies may take others' messages with it",
    )  # fmt: skip
