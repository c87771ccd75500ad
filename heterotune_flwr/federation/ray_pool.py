"""Remedy for a simulation worker that dies (seen in Flower 1.41): it costs one message, not all later ones.

When a Ray actor of Flower's simulation dies (out of memory, SIGKILL), Flower puts the dead actor back among the idle
ones. It then answers whatever it is given with an error at once, and so takes most of the messages that follow. Here
the pool gets a fresh actor instead. The message that was lost is sent once more by the server
(:meth:`.transport.Transport.collect`). ``tests/federation/test_ray_pool.py`` watches that Flower still works like that.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

log = logging.getLogger(__name__)

_SIMULATION = "flwr.simulation.run_simulation"
_MODULE, _POOL, _METHOD = (
    "flwr.simulation.ray_transport.ray_actor",
    "BasicActorPool",
    "add_actor_back_to_pool",
)
_ATTRIBUTES = ("_future_to_actor", "pool", "create_actor_fn")


def mend_actor_pool() -> bool:
    """Replace dead actors from now on; False where this process runs no simulation, or Flower has changed."""
    if not {_SIMULATION, _MODULE} & set(sys.modules):
        return False
    module = importlib.import_module(_MODULE)  # the server begins before Flower has loaded it
    pool = getattr(module, _POOL, None)
    method = getattr(pool, _METHOD, None)
    if method is None:
        log.warning(
            "Flower's actor pool has changed: a worker that dies may take others' messages with it"
        )
        return False
    if getattr(method, "mended", False):
        return True

    def add_actor_back_to_pool(self: Any, future: Any) -> None:
        # Flower calls it while it handles the error that ended the actor.
        if not _is_death(sys.exc_info()[1]) or any(not hasattr(self, a) for a in _ATTRIBUTES):
            method(self, future)
            return
        self._future_to_actor.pop(future)
        self.pool.append(self.create_actor_fn())
        log.warning("a simulation worker died; another one takes its place")

    add_actor_back_to_pool.mended = True  # type: ignore[attr-defined]
    setattr(pool, _METHOD, add_actor_back_to_pool)
    return True


def _is_death(error: BaseException | None) -> bool:
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError)
