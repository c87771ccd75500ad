"""Carries a strategy's requests to clients: maps only where needed, failures on record."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.directions import down_codec, exact_codec, up_codec
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.evaluation import check_tests
from heterotune_flwr.federation.journal import Pace
from heterotune_flwr.federation.ledger import Exchanged, Ledger
from heterotune_flwr.federation.messenger import Enough, Replies, make_message, send_and_collect
from heterotune_flwr.federation.resend import Resend
from heterotune_flwr.federation.roster import AGAIN_SECONDS, LeftOut, Roster
from heterotune_flwr.federation.safety import Safety
from heterotune_flwr.federation.sampling import sample_size
from heterotune_flwr.federation.session import Maps, StrategyContext
from heterotune_flwr.federation.simulated import most_in_flight
from heterotune_flwr.federation.update_gate import MOST_METRICS
from heterotune_flwr.federation.updates import RESERVED
from heterotune_flwr.flower import ArrayRecord, Grid, Message, RecordDict
from heterotune_flwr.names import safe_text
from heterotune_flwr.protocol.cached import CachedRef, read_cache_digest
from heterotune_flwr.protocol.messages import EVALUATE, TRAIN, EvaluateRequest, TrainRequest
from heterotune_flwr.protocol.wire import (
    ERROR_MAPS_MISSING,
    ERROR_REFUSED,
    ERROR_TENSORS_MISSING,
    MAPS,
    RemoteError,
    read_config,
    read_field,
    read_metrics,
    read_texts,
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

    """

    def __init__(self, context: StrategyContext, roster: Roster, maps: Maps | None) -> None:
        self.context = context
        self.roster = roster
        self.ledger = Ledger()
        self._maps = maps
        self._by_node = roster.node_to_client()
        self._holds_maps: set[str] = set()
        #: Maps that virtual clients, who share this machine's disk, have put there; who is sent them all the same.
        self._on_disk: set[str] = set()
        self._lacks_maps: set[str] = set()
        self._spared: set[str] = set()
        self._records: OrderedDict[str, ArrayRecord] = OrderedDict()
        self._resend = Resend(context.config.exchange)
        self._requests: dict[str, TrainRequest | EvaluateRequest] = {}
        self._failed: dict[str, str] = {}
        self._declined: dict[str, str] = {}
        self._waited: dict[str, float] = {}
        self.safety = Safety.of(context.config.server, context.config.exchange)
        for client_id in roster.clients:
            self.ledger.one_time(
                client_id, roster.bytes_down[client_id], roster.bytes_up[client_id]
            )
        if maps is not None:
            for client_id, down in maps.bytes_down.items():
                self.ledger.one_time(client_id, down, maps.bytes_up[client_id])

    def maps_for(self, client_id: str) -> tuple[str, Tensors | None]:
        """Digest of the client's maps, and the maps themselves unless it is known to hold them."""
        if self._maps is None:
            return "", None
        type_key = self.roster.clients[client_id].info.type_key
        known = client_id in self._holds_maps
        return self._maps.digests[type_key], None if known else self._maps.tensors[type_key]

    def message(
        self, client_id: str, request: TrainRequest | EvaluateRequest, kind: str, round: int
    ) -> Message:
        """Build the message that carries a request, but for what the client still holds."""
        self._requests[client_id] = request
        content = self._content(self._resend.without_held(client_id, request))
        node_id = self.roster.clients[client_id].node_id
        return make_message(content, node_id, kind, round, self._deadline(client_id))

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

    def _goes_out(self, message: Message) -> RecordDict:
        """A message's content without maps that the virtual clients of a type have on their common disk.

        They are counted as if they went to every client once, as they do to real nodes.
        """
        content = message.content
        client_id = self._by_node[message.metadata.dst_node_id]
        if MAPS not in content or client_id in self._lacks_maps:
            return content
        if read_field(read_config(content), "maps_digest", str) not in self._on_disk:
            return content
        self._spared.add(client_id)
        return RecordDict({name: record for name, record in content.items() if name != MAPS})

    def expected(self, shapes: Mapping[str, tuple[int, ...]]) -> Expected:
        """What a client's update may be before it is decoded."""
        exchange = self.context.config.exchange
        return Expected(shapes, {up_codec(exchange), exact_codec(exchange)})

    def client_of(self, message: Message) -> str | None:
        """Id of the client a reply came from, None for a stranger."""
        return self._by_node.get(message.metadata.src_node_id)

    def collect(
        self,
        grid: Grid,
        messages: Sequence[Message],
        kind: str,
        round: int,
        is_round: bool = True,
        arrived: Callable[[Message], None] | None = None,
    ) -> list[Message]:
        """Send, wait, and return the replies that carry a result.

        Every reply is journalled when it arrives. A client that lost its maps, or tensors that were not
        sent again (a wiped disk), is sent them once. A message whose process died is sent once more: training is a
        function of the message and the client's state before the round, so doing it twice changes nothing. Failures
        end up in the journal as ``client_failed``. ``is_round``: whether these are a round, with its quorum, its
        patience with nodes that are away and its verdict when all processes die; guests' lessons are none.
        ``arrived`` is called with every reply that is returned, when it comes.

        Raises
        ------
        FederationError
            The processes of all clients (of two or more) died, twice: not the clients but the machine under them is
            gone. The last checkpoint is where a resumed run goes on.

        """
        sent = {message.metadata.dst_node_id: message for message in messages}
        self._failed, self._waited = {}, {}
        good: list[Message] = []
        lost: list[tuple[Message, str]] = []
        unreadable: dict[str, str] = {}

        def on_reply(reply: Message) -> bool:
            client_id = self._by_node[reply.metadata.src_node_id]
            request = sent[reply.metadata.src_node_id]
            try:
                config = read_config(reply.content)
                kept = read_cache_digest(config)
                self._account(client_id, request, reply, kind, round)
                metrics = read_metrics(reply.content)
                if kind == TRAIN:
                    self._journal_reply(client_id, round, metrics)
                else:
                    check_tests(metrics, read_texts(read_config(request.content), "test_sets"))
            except RemoteError as error:
                if _can_send_more(request, error.kind) or (
                    error.kind == ERROR_MAPS_MISSING and client_id in self._spared
                ):
                    lost.append((request, error.kind))
                elif error.kind == ERROR_REFUSED:
                    self._leave_out(client_id, round, str(error))
                else:
                    self._failed[client_id] = str(error)
                return False
            except HeteroTuneError as error:  # the round goes on without it
                unreadable[client_id] = str(error)
                return False
            if config.get("maps_digest"):
                self._holds_maps.add(client_id)
                if most_in_flight(grid) is not None:
                    self._on_disk.add(self.maps_for(client_id)[0])
            self._resend.confirm(client_id, kept)
            good.append(reply)
            if arrived is not None:
                arrived(reply)
            return True

        enough = self._enough(len(messages)) if kind == TRAIN and is_round else None
        replies = self._send_and_collect(grid, messages, kind, round, on_reply, enough)
        if replies.died:
            again = [
                self._once_more(sent[node], replies, kind, round) for node in sorted(replies.died)
            ]
            second = self._send_and_collect(grid, again, kind, round, on_reply)
            if is_round and len(second.died) == len(messages) > 1:
                raise FederationError(
                    f"the processes of all {len(messages)} clients died, twice: {min(second.failures.values())}"
                )
            self._note(second, round)
        if kind == TRAIN and is_round:
            self._await_return(grid, sent, replies, on_reply, round, good)
        self._note(replies, round)
        while lost:  # twice at most: each kind of thing is sent once
            again = [self._with_more(message, missing, kind, round) for message, missing in lost]
            lost.clear()
            sent |= {message.metadata.dst_node_id: message for message in again}
            self._note(self._send_and_collect(grid, again, kind, round, on_reply), round)
        for client_id, reason in sorted(self._failed.items()):
            fields: dict[str, Any] = {"message_type": kind}
            if client_id in self._waited:
                fields |= {"straggler": True, "waited_seconds": self._waited[client_id]}
            self.refuse(client_id, round, reason, "client_failed", **fields)
        for client_id, reason in sorted(unreadable.items()):
            self.quarantine(client_id, round, "unreadable", reason)
        return good

    def state_dict(self) -> State:
        """The ledger, which clients hold their maps, and what is known of their behaviour."""
        safety = self.safety.state_dict()
        return {
            "ledger": self.ledger.state_dict(),
            "holds_maps": self._holds_maps,
            "safety": safety,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`; what this start has cost already is added."""
        self.ledger.add(state["ledger"])
        self._holds_maps = set(state["holds_maps"]) & set(self.roster.clients)
        self.safety.load_state_dict(state["safety"])

    def _send_and_collect(
        self,
        grid: Grid,
        messages: Sequence[Message],
        kind: str,
        round: int,
        on_reply: Callable[[Message], bool],
        enough: Enough | None = None,
    ) -> Replies:
        """Send with every client's own deadline, and measure how long the answers take."""
        clients = {m.metadata.dst_node_id: self._by_node[m.metadata.dst_node_id] for m in messages}
        deadlines = {node: self._deadline(client_id) for node, client_id in clients.items()}
        testing = Pace(self, "testing", round=round) if kind == EVALUATE else None
        virtual = most_in_flight(grid) is not None
        replies = send_and_collect(
            grid,
            messages,
            deadlines,
            on_reply,
            enough,
            testing,
            self._goes_out if virtual else None,
        )
        for node in sorted(replies.taken):
            client_id = clients[node]
            type_key = self.roster.clients[client_id].info.type_key
            effort, seconds = self._requests[client_id].effort, replies.seconds[node]
            self.safety.times.measured(effort, type_key, client_id, seconds)
        return replies

    def _await_return(
        self,
        grid: Grid,
        sent: Mapping[int, Message],
        replies: Replies,
        on_reply: Callable[[Message], bool],
        round: int,
        good: Sequence[Message],
    ) -> None:
        """Wait for nodes that are away, without which a round would be skipped, and give them its message again.

        They may be restarting; and where all are away Flower says so at once, so that a few skipped rounds in a row,
        after which a run gives up, would pass within a second. The patience is ``server.wait_seconds``.
        """
        server = self.context.config.server
        deadline = time.monotonic() + server.wait_seconds
        away = set(replies.away)
        while away and len(good) < server.min_results and time.monotonic() < deadline:
            back = away & set(grid.get_node_ids())
            again = [self._once_more(sent[node], replies, TRAIN, round) for node in sorted(back)]
            second = self._send_and_collect(grid, again, TRAIN, round, on_reply)
            replies.failures |= second.failures
            replies.late |= second.late
            replies.seconds |= second.seconds
            away = away - back | second.away
            if away and len(good) < server.min_results:
                time.sleep(min(AGAIN_SECONDS, server.wait_seconds))

    def _note(self, replies: Replies, round: int) -> None:
        """Remember every failure and who was late; journal a round that closed early."""
        self._waited |= {self._by_node[node]: replies.seconds[node] for node in replies.late}
        for node in replies.late:
            self.safety.times.missed(self._by_node[node])
        if replies.unawaited:
            names = sorted(self._by_node[node] for node in replies.unawaited)
            self.event("round_closed", round=round, unawaited=names)
        self._failed |= {self._by_node[node]: reason for node, reason in replies.failures.items()}

    def _enough(self, asked: int) -> Enough | None:
        """When a training round may close early, as ``server.quorum`` and ``server.oversample`` say."""
        server = self.context.config.server
        if server.quorum is None and not server.oversample:
            return None
        needed = sample_size(len(self.roster.learners), server.participation)
        quorum = None
        if server.quorum is not None:
            quorum = max(math.ceil(server.quorum * min(asked, needed)), server.min_results)
        return Enough(needed if server.oversample else None, quorum, server.grace_seconds)

    def _deadline(self, client_id: str) -> float:
        """Patience with a client, for the request that it was last sent."""
        type_key, effort = (
            self.roster.clients[client_id].info.type_key,
            self._requests[client_id].effort,
        )
        return self.safety.times.deadline(effort, type_key, client_id)

    def _leave_out(self, client_id: str, round: int, reason: str) -> None:
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

    def _once_more(self, message: Message, replies: Replies, kind: str, round: int) -> Message:
        """The same message for the process that follows one which died."""
        node_id = message.metadata.dst_node_id
        client_id, reason = self._by_node[node_id], replies.failures.pop(node_id)
        self.event("sent_again", round=round, client_id=client_id, reason=reason, message_type=kind)
        patience = self._deadline(client_id)
        return make_message(message.content, node_id, kind, round, patience)

    def _with_more(self, message: Message, missing: str, kind: str, round: int) -> Message:
        """The same message with the maps, or with all tensors."""
        client_id = self._by_node[message.metadata.dst_node_id]
        content = message.content
        if missing == ERROR_TENSORS_MISSING:
            whole = self._content(self._requests[client_id])
            if MAPS in content:
                whole[MAPS] = content[MAPS]
            content = whole
        else:
            self._holds_maps.discard(client_id)
            self._spared.discard(client_id)
            self._lacks_maps.add(client_id)
            digest, maps = self.maps_for(client_id)
            self._on_disk.discard(digest)
            content[MAPS] = pack(maps or {}, exact_codec(self.context.config.exchange))
        node_id = message.metadata.dst_node_id
        return make_message(content, node_id, kind, round, self._deadline(client_id))

    def _account(
        self, client_id: str, request: Message, reply: Message, kind: str, round: int
    ) -> None:
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

    def _journal_reply(self, client_id: str, round: int, metrics: dict[str, float]) -> None:
        self.event(
            "train_reply",
            round=round,
            of=self.context.config.server.rounds,
            client_id=client_id,
            type=self.roster.clients[client_id].info.type_key,
            **{key: metrics[key] for key in sorted(metrics)[:MOST_METRICS] if key not in RESERVED},
        )


def _can_send_more(request: Message, missing: str) -> bool:
    """Whether what a client says it lacks was left out of the request."""
    if missing == ERROR_TENSORS_MISSING:
        return bool(CachedRef.from_config(read_config(request.content)).names)
    return missing == ERROR_MAPS_MISSING and MAPS not in request.content
