"""Sending messages and collecting replies as they arrive.

``Grid.send_and_receive`` looks for replies every three seconds and drops those that never come
without a word. A round of small adapters takes less than a second, so we push and pull ourselves,
hand every reply over the moment it is here, and name who did not answer and why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from heterotune_flwr.flower import Grid, Message, RecordDict

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: Share of the patience a message lives; the rest is for the error about its end to arrive.
_TTL_SHARE = 0.98


@dataclass
class Replies:
    """What came back: messages with content, and one line per node that gave none."""

    messages: list[Message] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)


def make_message(
    content: RecordDict, node_id: int, message_type: str, round: int, timeout: float
) -> Message:
    """A message that expires slightly before we stop waiting for its reply."""
    return Message(content, node_id, message_type, ttl=_TTL_SHARE * timeout, group_id=str(round))


def converse(
    grid: Grid,
    messages: Sequence[Message],
    timeout: float,
    on_reply: Callable[[Message], None] | None = None,
) -> Replies:
    """Send messages, at most one per node, and wait for the replies.

    Parameters
    ----------
    grid, messages
        Where to send what.
    timeout
        Seconds; whoever has not answered by then is reported in ``failures``.
    on_reply
        Called with every reply that has content, in order of arrival.

    """
    replies = Replies()
    waiting: dict[str, int] = {}
    ids: list[str | None] = list(grid.push_messages(messages)) if messages else []
    # Flower marks a refused message by None, and a refused batch by an empty list.
    for message, message_id in zip(messages, ids or [None] * len(messages), strict=True):
        node_id = message.metadata.dst_node_id
        if message_id:
            waiting[message_id] = node_id
        else:
            replies.failures[node_id] = "the message could not be sent"
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            node_id = waiting.pop(reply.metadata.reply_to_message_id, -1)
            if node_id == -1:
                continue
            if reply.has_content():
                replies.messages.append(reply)
                if on_reply is not None:
                    on_reply(reply)
            else:
                lines = str(reply.error.reason or "no reason given").strip().splitlines()
                replies.failures[node_id] = f"error {reply.error.code}: {lines[-1]}"
        if time.monotonic() >= deadline:
            break
        if waiting and not arrived:
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        else:
            pause = _FIRST_PAUSE
    for node_id in waiting.values():
        replies.failures[node_id] = f"no reply within {timeout:.0f} s"
    return replies


def wait_for_nodes(grid: Grid, minimum: int, seconds: float, pause: float = 0.5) -> list[int]:
    """Wait until ``minimum`` nodes are connected or the patience ends; return those there are."""
    deadline = time.monotonic() + seconds
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= minimum or time.monotonic() >= deadline:
            return nodes
        time.sleep(pause)
