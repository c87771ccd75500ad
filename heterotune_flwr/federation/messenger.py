"""Sending messages and collecting replies as they arrive.

``Grid.send_and_receive`` looks for replies every three seconds and drops those that never come
without a word. A round of small adapters takes less than a second, so we push and pull ourselves,
hand every reply over the moment it is here, and name who did not answer and why.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from heterotune_flwr.federation.simulated import most_in_flight
from heterotune_flwr.flower import Grid, Message, RecordDict
from heterotune_flwr.names import safe_text

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: Longest pause where the next message goes out when an answer has come.
_BRIEF_PAUSE = 0.1
#: Share of the patience a message lives; the rest is for the error about its end to arrive.
_TTL_SHARE = 0.98
#: An error that arrives after this share of the patience tells of the message's end.
_LATE_SHARE = 0.95
#: Flower's codes for a simulation's worker (UNKNOWN) and for a deployed ClientApp (CLIENT_APP_CRASHED) that is gone.
_DIED = (0, 8)
#: Flower's code for a node whose heartbeats have stopped (NODE_UNAVAILABLE): it is away, and may well come back.
_AWAY = 5


@dataclass
class Replies:
    """What came back: messages with content, and one line per node that gave none.

    Attributes
    ----------
    messages, failures
        Replies in order of arrival; node id -> reason.
    seconds
        Node id -> seconds until its reply (or error) was here, or until it was given up.
    taken
        Nodes whose reply counts (see ``on_reply`` of :func:`send_and_collect`).
    late
        Nodes that did not answer within their deadline: stragglers, or gone.
    unawaited
        Nodes that were no longer waited for because enough others had answered.
    died
        Nodes whose process died with the message (killed, out of memory): another process may well answer it.
    away
        Nodes that Flower had lost sight of, before or after the message; they may well be restarting.

    """

    messages: list[Message] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    unawaited: set[int] = field(default_factory=set)
    died: set[int] = field(default_factory=set)
    away: set[int] = field(default_factory=set)

    @property
    def passing(self) -> set[int]:
        """Nodes that failed for a reason that may be gone the next time they are asked."""
        return self.died | self.away


@dataclass(frozen=True)
class Enough:
    """When a round may close before everybody has answered.

    Attributes
    ----------
    first
        Close at once when so many messages were taken; None: never for this reason.
    quorum, grace
        Close ``grace`` seconds after ``quorum`` messages were taken; None: never for this reason.

    """

    first: int | None = None
    quorum: int | None = None
    grace: float = 0.0


def make_message(
    content: RecordDict, node_id: int, message_type: str, round: int, timeout: float
) -> Message:
    """A message that expires slightly before we stop waiting for its reply."""
    return Message(content, node_id, message_type, ttl=_TTL_SHARE * timeout, group_id=str(round))


def send_and_collect(
    grid: Grid,
    messages: Sequence[Message],
    timeout: float | Mapping[int, float],
    on_reply: Callable[[Message], bool | None] | None = None,
    enough: Enough | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    outgoing: Callable[[Message], RecordDict] | None = None,
) -> Replies:
    """Send messages, at most one per node, and wait for the replies.

    Real nodes are all asked at once, virtual ones a few at a time (:func:`.simulated.most_in_flight`); a deadline and
    a message's life count from its own sending.

    Parameters
    ----------
    grid, messages
        Where to send what.
    timeout
        Seconds, for all or per node id; whoever has not answered by then is reported in ``failures``.
    on_reply
        Called with every reply that has content, in order of arrival; returns False for one that does not count
        towards ``enough``.
    enough
        When to stop waiting although some have not answered, or were not asked yet; those are in ``unawaited``.
    on_progress
        Called with how many have answered or were given up, and how many there are, whenever that changes.
    outgoing
        What of a message really goes out, asked when it does; None: its content.

    """
    talk = _Conversation(grid, deque(messages), timeout, on_reply, enough or Enough(), outgoing)
    return talk.run(on_progress)


@dataclass
class _Conversation:
    """One exchange of messages; see :func:`send_and_collect`."""

    grid: Grid
    queue: deque[Message]
    timeout: float | Mapping[int, float]
    on_reply: Callable[[Message], bool | None] | None
    enough: Enough
    outgoing: Callable[[Message], RecordDict] | None
    replies: Replies = field(default_factory=Replies)
    #: Message id -> its node, and when it was sent (seconds since the beginning).
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)
    quorum_since: float = math.inf
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Count what is to be sent, and how much of it may be under way."""
        self.total, self.most = len(self.queue), most_in_flight(self.grid)

    def _patience(self, node_id: int) -> float:
        return self.timeout[node_id] if isinstance(self.timeout, Mapping) else self.timeout

    def _send(self) -> None:
        """Send what may be under way."""
        room = len(self.queue) if self.most is None else self.most - len(self.waiting)
        batch = [self.queue.popleft() for _ in range(min(room, len(self.queue)))]
        if not batch:
            return
        batch = [self._fresh(message) for message in batch]
        ids: list[str | None] = list(self.grid.push_messages(batch))
        now = self.elapsed
        # Flower marks a refused message by None; its simulation leaves it out, and a batch too large is refused with an
        # empty list. A message that was taken has its id in its metadata.
        if len(ids) != len(batch):
            own = [message.metadata.message_id for message in batch]
            ids = [message_id if message_id in ids else None for message_id in own]
        for message, message_id in zip(batch, ids, strict=True):
            node_id = message.metadata.dst_node_id
            if message_id:
                self.waiting[message_id] = (node_id, now)
            else:
                self.replies.failures[node_id] = "the message could not be sent"
                self.replies.away.add(node_id)

    def _fresh(self, message: Message) -> Message:
        """The message as made now, so that the time in the queue is no part of its life."""
        content = message.content if self.outgoing is None else self.outgoing(message)
        if self.most is None and content is message.content:
            return message
        to = message.metadata
        return Message(content, to.dst_node_id, to.message_type, ttl=to.ttl, group_id=to.group_id)

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> Replies:
        """Wait until everybody has answered, is late, or need not be waited for."""
        pause, done = _FIRST_PAUSE, 0
        longest = _LONGEST_PAUSE if self.most is None else _BRIEF_PAUSE
        while self.waiting or self.queue:
            self._send()
            arrived = list(self.grid.pull_messages(list(self.waiting)))
            for reply in arrived:
                self._take(reply)
            self._give_up()
            now_done = self.total - len(self.queue) - len(self.waiting)
            if on_progress is not None and now_done != done:
                on_progress(now_done, self.total)
            done = now_done
            if self._closes():
                self.replies.unawaited |= {node_id for node_id, _ in self.waiting.values()}
                self.replies.unawaited |= {m.metadata.dst_node_id for m in self.queue}
                break
            if self.waiting and not arrived:
                time.sleep(pause)
                pause = min(1.5 * pause, longest)
            else:
                pause = _FIRST_PAUSE
        return self.replies

    @property
    def elapsed(self) -> float:
        """Seconds since the first message was sent."""
        return time.monotonic() - self.started

    def _take(self, reply: Message) -> None:
        """Believe the id of the message that is answered; a second answer to it is not asked for."""
        node_id, sent = self.waiting.pop(reply.metadata.reply_to_message_id, (None, 0.0))
        if node_id is None:
            return
        replies = self.replies
        replies.seconds[node_id] = self.elapsed - sent
        if not reply.has_content():
            self._note_error(node_id, reply)
        elif reply.metadata.src_node_id != node_id:
            replies.failures[node_id] = f"node {reply.metadata.src_node_id} answered in its place"
        elif self.enough.first is None or len(replies.taken) < self.enough.first:
            replies.messages.append(reply)
            if self.on_reply is None or self.on_reply(reply) is not False:
                replies.taken.add(node_id)
            if self.enough.quorum is not None and len(replies.taken) >= self.enough.quorum:
                self.quorum_since = min(self.quorum_since, self.elapsed)
        else:
            replies.unawaited.add(node_id)

    def _note_error(self, node_id: int, reply: Message) -> None:
        waited = self.replies.seconds[node_id]
        if waited >= _LATE_SHARE * self._patience(node_id):  # the message's own end, told by Flower
            self._note_late(node_id)
            return
        if reply.error.code in _DIED:
            self.replies.died.add(node_id)
        elif reply.error.code == _AWAY:
            self.replies.away.add(node_id)
        lines = str(reply.error.reason or "").strip().splitlines() or ["no reason given"]
        self.replies.failures[node_id] = safe_text(f"error {reply.error.code}: {lines[-1]}")

    def _note_late(self, node_id: int) -> None:
        self.replies.late.add(node_id)
        self.replies.failures[node_id] = f"no reply within {self._patience(node_id):.0f} s"

    def _give_up(self) -> None:
        """Stop waiting for those whose deadline is over."""
        now = self.elapsed
        for message_id, (node_id, sent) in list(self.waiting.items()):
            if now - sent >= self._patience(node_id):
                del self.waiting[message_id]
                self.replies.seconds[node_id] = now - sent
                self._note_late(node_id)

    def _closes(self) -> bool:
        first = self.enough.first
        full = first is not None and len(self.replies.taken) >= first
        return full or self.elapsed >= self.quorum_since + self.enough.grace


def wait_for_nodes(
    grid: Grid,
    minimum: int,
    seconds: float,
    pause: float = 0.5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Wait until ``minimum`` nodes are connected or the patience ends; return those there are.

    ``on_progress`` is called with how many are there, and ``minimum``, at every look.
    """
    deadline = time.monotonic() + seconds
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= minimum or time.monotonic() >= deadline:
            return nodes
        if on_progress is not None:
            on_progress(len(nodes), minimum)
        time.sleep(pause)
