"""A Grid that runs a ClientApp in this process: tests and small experiments without a SuperLink.

Messages really are serialised and read back, so what does not survive the wire does not pass here
either. Hundreds of clients take part in a round in a fraction of a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from heterotune_flwr.flower import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    identify_process,
)

#: Flower's code for an exception inside a ClientApp.
_CLIENT_APP_RAISED = 2
_RECORDS = {record.__name__: record for record in (ArrayRecord, ConfigRecord, MetricRecord)}


def _over_the_wire(content: RecordDict) -> RecordDict:
    """Serialise every record and read it back."""
    copy = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            copy[name] = ArrayRecord(dict(record.items()))
        else:
            kind = _RECORDS[type(record).__name__]
            copy[name] = kind.inflate(record.deflate())
    return copy


class InProcessGrid(Grid):
    """Run a ClientApp for every message, one after the other.

    Parameters
    ----------
    app
        The ClientApp, or any callable ``(message, context) -> message``.
    node_configs
        One per client, for instance ``{"partition-id": 0, "num-partitions": 3}``.
    run_config
        What every client's context carries as run configuration.
    drop
        Called with (node id, message type, round); True loses the message, as a dead node would.
    most_in_flight
        Messages under way at a time (:mod:`.simulated`); None: all at once, as with real nodes.

    """

    def __init__(
        self,
        app: ClientApp | Callable[[Message, Context], Message],
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any] | None = None,
        drop: Callable[[int, str, int], bool] | None = None,
        most_in_flight: int | None = None,
    ) -> None:
        identify_process()
        self.most_in_flight = most_in_flight
        self.app = app
        self.drop = drop
        self._counter = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self.contexts: dict[int, Context] = {}
        for index, node_config in enumerate(node_configs):
            # Node ids as Flower gives them: large, and in no useful order.
            node_id = 1000 + (index * 7919) % 104729
            self.contexts[node_id] = Context(
                run_id=0,
                node_id=node_id,
                node_config=dict(node_config),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
        self.messages_sent = 0

    @property
    def run(self) -> Any:
        """There is no Flower run behind this grid."""
        raise RuntimeError("an in-process grid belongs to no Flower run")

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is no Flower run behind this grid."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower's older way)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all clients."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the app on every message now; the replies wait to be pulled."""
        ids = []
        for message in messages:
            message_id = f"message-{next(self._counter)}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            self.messages_sent += 1
            node_id = message.metadata.dst_node_id
            round = int(message.metadata.group_id or 0)
            if self.drop is None or not self.drop(node_id, message.metadata.message_type, round):
                self._replies[message_id] = self.answer(message, self.contexts[node_id])
        return ids

    def answer(self, message: Message, context: Context) -> Message:
        """What a node replies to a message that reaches it."""
        request = Message(
            _over_the_wire(message.content),
            message.metadata.dst_node_id,
            message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        request.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            reply = self.app(request, context)
            reply.content = _over_the_wire(reply.content)
        except Exception as error:  # as Flower does: an app that raises gives an error reply
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(_CLIENT_APP_RAISED, reason), reply_to=request)
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over the replies to the given messages."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull at once; ``timeout`` has no meaning here."""
        return self.pull_messages(self.push_messages(messages))
