"""WithinType: the same bank, averaged only among clients of the same backbone."""

from __future__ import annotations

from heterotune_flwr.dema.bank import tier_of
from heterotune_flwr.strategies.base import HeteroStrategy, Scope


class WithinType(HeteroStrategy):
    """FedAvg (arXiv 1602.05629) of the DeMA bank inside each model type.

    The rival HeteroTune has to beat: equal adapter, equal maps, equal bytes, but one bank per type.
    Everything except private experts (and private cores) has scope ``type``; :meth:`combine` is the base class's
    example-weighted mean.
    """

    def scope(self, name: str, type_key: str) -> Scope:
        """Share with the own type only."""
        tier = tier_of(name)
        own = tier == "private" or (tier == "core" and self.method.core_scope == "client")
        return "client" if own else "type"
