"""Carries a strategy's requests to clients: maps only where needed, failures on record."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from heterotune_flwr.exchange.directions import down_codec, exact_codec, up_codec
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.collection import Collection
from heterotune_flwr.federation.ledger import Exchanged, Ledger
from heterotune_flwr.federation.map_holders import MapHolders
from heterotune_flwr.federation.messenger import make_message
from heterotune_flwr.federation.resend import Resend
from heterotune_flwr.federation.roster import LeftOut, Roster
from heterotune_flwr.federation.safety import Safety
from heterotune_flwr.federation.session import Maps, StrategyContext
from heterotune_flwr.federation.symbols_service import Found
from heterotune_flwr.federation.update_gate import MOST_METRICS
from heterotune_flwr.federation.updates import RESERVED
from heterotune_flwr.flower import ArrayRecord, Grid, Message, RecordDict
from heterotune_flwr.names import safe_text
from heterotune_flwr.protocol.cached import CachedRef
from heterotune_flwr.protocol.messages import TRAIN, EvaluateRequest, TrainRequest
from heterotune_flwr.protocol.wire import (
    ERROR_MAPS_MISSING,
    ERROR_TENSORS_MISSING,
    MAPS,
    read_config,
)

log = logging.getLogger(__name__)

#: Different records of tensors that are kept to be sent again.
_RECORDS = 64


class Transport:
    """Sends and collects for one strategy.

    Parameters
    ----------
    context, roster
        For whom and to whom.
    maps
        Frozen maps of the types, None when the method has none.
    symbols
        What the types' vocabularies have in common, None where nobody needs it.

    Attributes
    ----------
    ledger, safety
        All bytes, and what is known of clients' behaviour.
    maps, resend
        What clients hold already.
    names
        Client ids by node.

    """

    def __init__(
        self,
        context: StrategyContext,
        roster: Roster,
        maps: Maps | None,
        symbols: Found | None = None,
    ) -> None:
        self.context = context
        self.roster = roster
        self.ledger = Ledger()
        self.maps = MapHolders(maps, roster)
        self.resend = Resend(context.config.exchange)
        self.safety = Safety.of(context.config.server, context.config.exchange)
        self.names = roster.node_to_client()
        self._records: OrderedDict[str, ArrayRecord] = OrderedDict()
        self._requests: dict[str, TrainRequest | EvaluateRequest] = {}
        self._failed: dict[str, str] = {}
        self._declined: dict[str, str] = {}
        for client_id in roster.clients:
            self.ledger.one_time(
                client_id, roster.bytes_down[client_id], roster.bytes_up[client_id]
            )
        spent = [(maps.bytes_down, maps.bytes_up)] if maps is not None else []
        spent += [(symbols.down, symbols.up)] if symbols is not None else []
        for down, up in spent:
            for client_id, asked in down.items():
                self.ledger.one_time(client_id, asked, up[client_id])

    # ---------------------------------------------------------------------------------- messages

    def maps_for(self, client_id: str) -> tuple[str, Tensors | None]:
        """As :meth:`.map_holders.MapHolders.of`."""
        return self.maps.of(client_id)

    def expected(self, shapes: Mapping[str, tuple[int, ...]]) -> Expected:
        """What a client's update may be before it is decoded."""
        exchange = self.context.config.exchange
        return Expected(shapes, {up_codec(exchange), exact_codec(exchange)})

    def message(
        self, client_id: str, request: TrainRequest | EvaluateRequest, kind: str, round: int
    ) -> Message:
        """Build the message that carries a request, but for what the client still holds."""
        self._requests[client_id] = request
        content = self._content(self.resend.without_held(client_id, request))
        node_id = self.roster.clients[client_id].node_id
        return make_message(content, node_id, kind, round, self.deadline(client_id))

    def _content(self, request: TrainRequest | EvaluateRequest) -> RecordDict:
        exchange = self.context.config.exchange
        content = request.to_content(down_codec(exchange), exact_codec(exchange))
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                content[name] = self._once(record)
        return content

    def _once(self, record: ArrayRecord) -> ArrayRecord:
        """The same record for all clients that are sent the same bits: a thousand messages wait at a time."""
        digest = hashlib.sha256()
        for name, array in record.items():
            digest.update(f"{name} {array.dtype} {array.shape} {len(array.data)};".encode())
            digest.update(array.data)
        key = digest.hexdigest()
        found = self._records.setdefault(key, record)
        self._records.move_to_end(key)
        while len(self._records) > _RECORDS:
            self._records.popitem(last=False)
        return found

    def goes_out(self, message: Message) -> RecordDict:
        """What of a message goes out to a virtual client (:meth:`.map_holders.MapHolders.spare`)."""
        return self.maps.spare(self.client_to(message), message.content)

    def again(self, message: Message, content: RecordDict) -> Message:
        """A message of the same kind and round to the same node."""
        meta, client_id = message.metadata, self.client_to(message)
        patience = self.deadline(client_id)
        return make_message(
            content, meta.dst_node_id, meta.message_type, int(meta.group_id or 0), patience
        )

    def can_send_more(self, client_id: str, request: Message, missing: str) -> bool:
        """Whether what a client says it lacks was left out of the request."""
        if missing == ERROR_TENSORS_MISSING:
            return bool(CachedRef.from_config(read_config(request.content)).names)
        return missing == ERROR_MAPS_MISSING and self.maps.lacks(client_id, request.content)

    def with_more(self, message: Message, missing: str) -> Message:
        """The same message with the maps, or with all tensors."""
        client_id = self.client_to(message)
        content = message.content
        if missing == ERROR_TENSORS_MISSING:
            whole = self._content(self._requests[client_id])
            if MAPS in content:
                whole[MAPS] = content[MAPS]
            content = whole
        else:
            content[MAPS] = pack(
                self.maps.lost(client_id), exact_codec(self.context.config.exchange)
            )
        return self.again(message, content)

    # --------------------------------------------------------------------------------- collecting

    def collect(
        self,
        grid: Grid,
        messages: Sequence[Message],
        kind: str,
        round: int,
        is_round: bool = True,
        arrived: Callable[[Message], None] | None = None,
    ) -> list[Message]:
        """Send, wait, and return the replies that carry a result (see :class:`.collection.Collection`).

        Every reply is journalled when it arrives. A client that lost its maps, or tensors that were not
        sent again (a wiped disk), is sent them once. A message whose process died is sent once more: training is a
        function of the message and the client's state before the round, so doing it twice changes nothing. Failures
        end up in the journal as ``client_failed``.

        Raises
        ------
        FederationError
            The processes of all clients (of two or more) died, twice: not the clients but the machine under them is
            gone. The last checkpoint is where a resumed run goes on.

        """
        self._failed = {}
        asked = [self.client_to(message) for message in messages]
        patience = max(map(self.deadline, asked), default=0.0)
        self.event("asked", round=round, message_type=kind, asked=asked, seconds=patience)
        collection = Collection(self, grid, kind, round, is_round, arrived)
        collection.run(messages)
        for client_id, reason, facts in collection.reasons():
            self.refuse(client_id, round, reason, "client_failed", **facts)
        for client_id, reason in sorted(collection.unreadable.items()):
            self.quarantine(client_id, round, "unreadable", reason)
        return collection.good

    def client_of(self, message: Message) -> str | None:
        """Id of the client a reply came from, None for a stranger."""
        return self.names.get(message.metadata.src_node_id)

    def client_at(self, reply: Message) -> str:
        """Id of the client a reply came from."""
        return self.names[reply.metadata.src_node_id]

    def client_to(self, message: Message) -> str:
        """Id of the client a message goes to."""
        return self.names[message.metadata.dst_node_id]

    def _timed(self, client_id: str) -> tuple[str, str, str]:
        """What a client was last asked, as its reply times are kept."""
        return (
            self._requests[client_id].effort,
            self.roster.clients[client_id].info.type_key,
            client_id,
        )

    def deadline(self, client_id: str) -> float:
        """Patience with a client, for the request that it was last sent."""
        return self.safety.times.deadline(*self._timed(client_id))

    def measured(self, client_id: str, seconds: float) -> None:
        """Remember how long a client took."""
        self.safety.times.measured(*self._timed(client_id), seconds)

    # ---------------------------------------------------------------------------------- on record

    def leave_out(self, client_id: str, round: int, reason: str) -> None:
        """Note that a node's owner forbids what was asked: no failure. Said once for every reason."""
        reason = safe_text(reason)
        if self._declined.get(client_id) == reason:
            return
        self._declined[client_id] = reason
        node = LeftOut(self.roster.clients[client_id].node_id, client_id, reason)
        log.warning("left out: %s", node)
        self.event(
            "left_out", round=round, node_id=str(node.node_id), client_id=client_id, reason=reason
        )

    @property
    def failed(self) -> dict[str, str]:
        """Why each client's part in the last collection failed or was refused, by client id."""
        return dict(self._failed)

    @property
    def first_failure(self) -> str | None:
        """One line about the first client that failed in the last collection, or refuses to take part."""
        for client_id, reason in [*sorted(self._failed.items()), *sorted(self._declined.items())]:
            return f"{client_id}: {reason}"
        return None

    def refuse(
        self, client_id: str, round: int, reason: str, event: str = "refused", **fields: Any
    ) -> None:
        """Journal that a client's answer is not used, and why (in one printable line, whatever the client wrote)."""
        reason = safe_text(reason)
        self._failed.setdefault(client_id, reason)
        self.event(event, round=round, client_id=client_id, reason=reason, **fields)

    def quarantine(self, client_id: str, round: int, check: str, reason: str) -> None:
        """Count and journal an update that the gate refused."""
        self.safety.gate.count(client_id, check)
        self.refuse(client_id, round, reason, check=check)

    def event(self, event: str, /, **fields: Any) -> None:
        """Journal an event of this strategy."""
        self.context.session.journal.event(
            event, strategy=self.context.name, seed=self.context.seed, **fields
        )

    def account(
        self, client_id: str, request: Message, reply: Message, kind: str, round: int
    ) -> None:
        """Count and journal the bytes of a request and its reply."""
        exchanged = Exchanged.of(request.content, reply.content)
        type_key = self.roster.clients[client_id].info.type_key
        if kind == TRAIN:
            self.ledger.train(client_id, type_key, exchanged)
        else:
            self.ledger.evaluate(client_id, exchanged)
        self.event(
            "bytes",
            round=round,
            client_id=client_id,
            type=type_key,
            message_type=kind,
            codec_up=up_codec(self.context.config.exchange),
            codec_down=down_codec(self.context.config.exchange),
            **asdict(exchanged),
        )

    def journal_reply(self, client_id: str, round: int, metrics: Mapping[str, float]) -> None:
        """Journal what a client reports of its training."""
        self.event(
            "train_reply",
            round=round,
            of=self.context.config.server.rounds,
            client_id=client_id,
            type=self.roster.clients[client_id].info.type_key,
            **{key: metrics[key] for key in sorted(metrics)[:MOST_METRICS] if key not in RESERVED},
        )

    def state_dict(self) -> State:
        """The ledger, which clients hold their maps, and what is known of their behaviour."""
        safety = self.safety.state_dict()
        return {
            "ledger": self.ledger.state_dict(),
            "holds_maps": self.maps.holders,
            "safety": safety,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`; what this start has cost already is added."""
        self.ledger.add(state["ledger"])
        self.maps.holders = set(state["holds_maps"]) & set(self.roster.clients)
        self.safety.load_state_dict(state["safety"])
