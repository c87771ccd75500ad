"""Which clients hold the frozen maps of their type, so that maps travel once."""

from __future__ import annotations

from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.maps_service import Maps
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.flower import RecordDict
from heterotune_flwr.protocol.wire import MAPS, read_config, read_field


class MapHolders:
    """The maps of all types, and who is known to have them.

    Parameters
    ----------
    maps
        None where the method has none.
    roster
        The clients.

    """

    def __init__(self, maps: Maps | None, roster: Roster) -> None:
        self._maps, self._roster = maps, roster
        self.holders: set[str] = set()
        #: Maps that virtual clients, who share this machine's disk, have put there; who is sent them all the same.
        self._on_disk: set[str] = set()
        self._lacking: set[str] = set()
        self._spared: set[str] = set()

    def of(self, client_id: str) -> tuple[str, Tensors | None]:
        """Digest of the client's maps, and the maps themselves unless it is known to hold them."""
        if self._maps is None:
            return "", None
        type_key = self._roster.clients[client_id].info.type_key
        known = client_id in self.holders
        return self._maps.digests[type_key], None if known else self._maps.tensors[type_key]

    def confirm(self, client_id: str, virtual: bool) -> None:
        """Note that a client has worked with its maps; a ``virtual`` one has them on the common disk."""
        self.holders.add(client_id)
        if virtual:
            self._on_disk.add(self.of(client_id)[0])

    def spare(self, client_id: str, content: RecordDict) -> RecordDict:
        """A message's content without maps that the virtual clients of a type have on their common disk.

        They are counted as if they went to every client once, as they do to real nodes.
        """
        if MAPS not in content or client_id in self._lacking:
            return content
        if read_field(read_config(content), "maps_digest", str) not in self._on_disk:
            return content
        self._spared.add(client_id)
        return RecordDict({name: record for name, record in content.items() if name != MAPS})

    def lacks(self, client_id: str, content: RecordDict) -> bool:
        """Whether a client that misses its maps was indeed not sent them in a message."""
        return MAPS not in content or client_id in self._spared

    def lost(self, client_id: str) -> Tensors:
        """Note that a client has not got its maps (any more), and return them."""
        self.holders.discard(client_id)
        self._spared.discard(client_id)
        self._lacking.add(client_id)
        digest, maps = self.of(client_id)
        self._on_disk.discard(digest)
        return maps or {}
