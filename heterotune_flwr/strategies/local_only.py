"""LocalOnly: every client alone, the floor that sharing has to rise above."""

from __future__ import annotations

from heterotune_flwr.strategies.strategy import HeteroStrategy, Scope


class LocalOnly(HeteroStrategy):
    """No aggregation: the same adapter, the same steps, nothing is sent but metrics.

    Every tensor keeps scope ``client``; a client goes on where it stopped, from its own state.
    """

    def scope(self, name: str, type_key: str) -> Scope:
        """Nothing is shared."""
        return "client"
