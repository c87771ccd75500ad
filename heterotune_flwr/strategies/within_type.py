"""WithinType: the same bank, averaged only among clients of the same backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.channels.channel import server_half
from heterotune_flwr.dema.bank import part_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.strategy import HeteroStrategy, Scope


class WithinType(HeteroStrategy):
    """FedAvg (arXiv 1602.05629) of the DeMA bank inside each model type.

    The rival HeteroTune has to beat: equal adapter, equal maps, equal bytes, but one bank per type.
    Everything except cores of a client's own has scope ``type``; :meth:`combine` is the base class's
    example-weighted mean. Its channels pool over the own type and nobody else: what HeteroTune gains beyond them is not
    what public texts teach a type by itself.
    """

    @classmethod
    def channel_entries(cls, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """``pool_over: type`` for every channel, whatever the channel's default is."""
        return {name: _inside(name, given) for name, given in entries.items()}

    def scope(self, name: str, type_key: str) -> Scope:
        """Share with the own type only."""
        own = part_of(name) == "core" and self.method.core_scope == "client"
        return "client" if own else "type"


def _inside(channel: str, given: Any) -> Any:
    if not isinstance(given, Mapping) or not server_half(channel).pools:
        return given
    if given.get("pool_over") == "all":
        raise ConfigError(f"{channel}.pool_over is 'all', but nothing crosses types in WithinType")
    return {"pool_over": "type", **given}
