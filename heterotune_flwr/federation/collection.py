"""One collection: messages out, replies in, and what is done about clients that lose things, die or are away."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.federation.evaluation import check_tests
from heterotune_flwr.federation.journal import Pace
from heterotune_flwr.federation.messenger import Enough, Replies, send_and_collect
from heterotune_flwr.federation.roster import AGAIN_SECONDS
from heterotune_flwr.federation.sampling import sample_size
from heterotune_flwr.federation.simulated import most_in_flight
from heterotune_flwr.flower import Grid, Message
from heterotune_flwr.protocol.cached import read_cache_digest
from heterotune_flwr.protocol.messages import EVALUATE, TRAIN
from heterotune_flwr.protocol.wire import (
    ERROR_REFUSED,
    RemoteError,
    read_config,
    read_metrics,
    read_texts,
)

if TYPE_CHECKING:
    from heterotune_flwr.federation.transport import Transport


@dataclass
class Collection:
    """Messages of one kind in one round, under way.

    Attributes
    ----------
    transport, grid, kind, round
        Whose messages, through what, of which kind and round.
    is_round
        Whether these are a round, with its quorum, its patience with nodes that are away and its verdict when all
        processes die; guests' lessons are none.
    arrived
        Called with every reply that is returned, when it comes.
    good
        The replies that carry a result.
    failed
        Why clients failed, by id.
    unreadable
        Why replies could not be read, by client id.
    waited
        Seconds that were waited for those who came too late.

    """

    transport: Transport
    grid: Grid
    kind: str
    round: int
    is_round: bool = True
    arrived: Callable[[Message], None] | None = None
    good: list[Message] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def run(self, messages: Sequence[Message]) -> None:
        """Send, wait, and send again what was lost (FederationError: all processes died, twice)."""
        self._sent = {message.metadata.dst_node_id: message for message in messages}
        self._lost: list[tuple[Message, str]] = []
        trains = self.kind == TRAIN and self.is_round
        replies = self._converse(messages, self._enough(len(messages)) if trains else None)
        if replies.died:
            second = self._converse(
                [self._once_more(node, replies) for node in sorted(replies.died)]
            )
            if self.is_round and len(second.died) == len(messages) > 1:
                raise FederationError(
                    f"the processes of all {len(messages)} clients died, twice: {min(second.failures.values())}"
                )
            self._note(second)
        if trains:
            self._await_return(replies)
        self._note(replies)
        while self._lost:  # twice at most: each kind of thing is sent once
            again = [self.transport.with_more(message, lacks) for message, lacks in self._lost]
            self._lost.clear()
            self._sent |= {message.metadata.dst_node_id: message for message in again}
            self._note(self._converse(again))

    def _on_reply(self, reply: Message) -> bool:
        """Take a reply in; whether it carries a result."""
        transport = self.transport
        client_id, request = transport.client_at(reply), self._sent[reply.metadata.src_node_id]
        try:
            config = read_config(reply.content)
            cached = read_cache_digest(config)
            transport.account(client_id, request, reply, self.kind, self.round)
            metrics = read_metrics(reply.content)
            if self.kind == TRAIN:
                transport.journal_reply(client_id, self.round, metrics)
            else:
                asked = read_config(request.content)
                chosen = ["choosing"] if asked.get("keep_as") else []
                check_tests(metrics, [*read_texts(asked, "test_sets"), *chosen])
        except RemoteError as error:
            self._on_error(client_id, request, error)
            return False
        except HeteroTuneError as error:  # the round goes on without it
            self.unreadable[client_id] = str(error)
            return False
        if config.get("maps_digest"):
            transport.maps.confirm(client_id, most_in_flight(self.grid) is not None)
        transport.resend.confirm(client_id, cached)
        self.good.append(reply)
        if self.arrived is not None:
            self.arrived(reply)
        return True

    def _on_error(self, client_id: str, request: Message, error: RemoteError) -> None:
        if self.transport.can_send_more(client_id, request, error.kind):
            self._lost.append((request, error.kind))
        elif error.kind == ERROR_REFUSED:
            self.transport.leave_out(client_id, self.round, str(error))
        else:
            self.failed[client_id] = str(error)

    def _converse(self, messages: Sequence[Message], enough: Enough | None = None) -> Replies:
        """Send with every client's own deadline, and measure how long the answers take."""
        transport = self.transport
        clients = {m.metadata.dst_node_id: transport.client_to(m) for m in messages}
        deadlines = {node: transport.deadline(client_id) for node, client_id in clients.items()}
        testing = self.kind == EVALUATE
        pace = Pace(transport, "testing", round=self.round) if testing else None
        virtual = most_in_flight(self.grid) is not None
        replies = send_and_collect(
            self.grid, messages, deadlines, self._on_reply, enough, pace, transport.goes_out if virtual else None
        )  # fmt: skip
        for node in sorted(replies.taken):
            transport.measured(clients[node], replies.seconds[node])
        return replies

    def _once_more(self, node: int, replies: Replies) -> Message:
        """The same message for the process that follows one which died."""
        client_id, reason = self.transport.client_to(self._sent[node]), replies.failures.pop(node)
        facts = {"round": self.round, "client_id": client_id, "message_type": self.kind}
        self.transport.event("sent_again", reason=reason, **facts)
        return self.transport.again(self._sent[node], self._sent[node].content)

    def _await_return(self, replies: Replies) -> None:
        """Wait for nodes that are away, without which a round would be skipped, and give them its message again.

        They may be restarting; and where all are away Flower says so at once, so that a few skipped rounds in a row,
        after which a run gives up, would pass within a second. The patience is ``server.wait_seconds``.
        """
        server = self.transport.context.config.server
        deadline = time.monotonic() + server.wait_seconds
        away = set(replies.away)
        while away and len(self.good) < server.min_results and time.monotonic() < deadline:
            back = away & set(self.grid.get_node_ids())
            second = self._converse([self._once_more(node, replies) for node in sorted(back)])
            replies.failures |= second.failures
            replies.late |= second.late
            replies.seconds |= second.seconds
            away = away - back | second.away
            if away and len(self.good) < server.min_results:
                time.sleep(min(AGAIN_SECONDS, server.wait_seconds))

    def _note(self, replies: Replies) -> None:
        """Remember every failure and who was late; journal a round that closed early."""
        names = self.transport.names
        self.waited |= {names[node]: replies.seconds[node] for node in replies.late}
        for node in replies.late:
            self.transport.safety.times.missed(names[node])
        if replies.unawaited:
            unawaited = sorted(names[node] for node in replies.unawaited)
            self.transport.event("round_closed", round=self.round, unawaited=unawaited)
        self.failed |= {names[node]: reason for node, reason in replies.failures.items()}

    def _enough(self, asked: int) -> Enough | None:
        """When a training round may close early, as ``server.quorum`` and ``server.oversample`` say."""
        server = self.transport.context.config.server
        if server.quorum is None and not server.oversample:
            return None
        needed = sample_size(len(self.transport.roster.learners), server.participation)
        quorum = None
        if server.quorum is not None:
            quorum = max(math.ceil(server.quorum * min(asked, needed)), server.min_results)
        return Enough(needed if server.oversample else None, quorum, server.grace_seconds)

    def reasons(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Who failed, why, and what else the journal says of it."""
        found = []
        for client_id, reason in sorted(self.failed.items()):
            facts: dict[str, Any] = {"message_type": self.kind}
            if client_id in self.waited:
                facts |= {"straggler": True, "waited_seconds": self.waited[client_id]}
            found.append((client_id, reason, facts))
        return found
