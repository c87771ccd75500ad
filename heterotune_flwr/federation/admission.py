"""Who gets past the update gate: replies in, usable updates out, the rest on record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.packing import payload_bytes
from heterotune_flwr.exchange.spill import Spill, Stored
from heterotune_flwr.federation.journal import writing
from heterotune_flwr.federation.transport import Transport
from heterotune_flwr.federation.update_gate import Asked, Candidate, RefusedError
from heterotune_flwr.federation.updates import ClientUpdate, fingerprint_of, norm_of, numbers_of
from heterotune_flwr.flower import ArrayRecord, Message
from heterotune_flwr.protocol.messages import EvaluateReply, TrainReply
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.wire import DELTAS

#: Bytes of answers of one round that wait as they came; later ones are read at once.
WAITING = 4_000_000


@dataclass(frozen=True)
class Admitted:
    """The usable updates of a round by client id, in client order; ``shares``: of those that are shortened."""

    candidates: dict[str, Candidate]
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def reports(self) -> list[TrainReply]:
        """What the clients answered."""
        return [candidate.reply for candidate in self.candidates.values()]

    def payloads(self, channel: str) -> dict[str, Payload | None]:
        """What they told a channel, in client order."""
        return {cid: found.reply.channels.get(channel) for cid, found in self.candidates.items()}

    @property
    def updates(self) -> list[ClientUpdate]:
        """Their updates, as long as they may be."""
        return [
            _shortened(candidate.update, self.shares.get(client_id, 1.0))
            for client_id, candidate in self.candidates.items()
        ]


def _shortened(update: ClientUpdate, share: float) -> ClientUpdate:
    if share == 1.0:
        return update
    factor, deltas = np.float32(share), update.deltas
    if isinstance(deltas, Stored):  # stays where it is
        return replace(update, deltas=deltas.scaled(factor))
    return replace(update, deltas={name: factor * value for name, value in deltas.items()})


class Intake:
    """One round's answers on their way through the gate: read when all are there, or as they come where they are many.

    Parameters
    ----------
    transport
        Of the strategy.
    asked
        Says, for a client id, what was asked of it.

    """

    def __init__(self, transport: Transport, asked: Callable[[str], Asked]) -> None:
        self._gate, self._asked, self._client_of = transport.safety.gate, asked, transport.client_of
        self._spill = Spill(transport.context.session.journal.directory)
        self._waiting = 0
        #: By identity of the message (which is kept, so that no other has it).
        self._early: dict[int, tuple[Message, Candidate | RefusedError]] = {}

    def arrived(self, message: Message) -> None:
        """Take down an answer; where too many wait already, read it now, and let go of what it brought."""
        record = message.content.get(DELTAS)
        if not isinstance(record, ArrayRecord):
            return
        self._waiting += payload_bytes(record)
        client_id = self._client_of(message)
        if self._waiting <= WAITING or client_id is None:
            return
        try:
            found: Candidate | RefusedError = self._read(message, client_id)
        except RefusedError as error:
            found = RefusedError(error.check, str(error))  # without what its traceback holds
        self._early[id(message)] = (message, found)
        del message.content[DELTAS]

    def candidate(self, message: Message, client_id: str) -> Candidate:
        """Read an answer, unless it was when it came (RefusedError: it is not usable)."""
        _, found = self._early.get(id(message), (None, None))
        if isinstance(found, RefusedError):
            raise found
        return found or self._read(message, client_id)

    def _read(self, message: Message, client_id: str) -> Candidate:
        candidate = self._gate.read(message.content, self._asked(client_id))
        deltas = candidate.update.deltas
        if not self._spill.takes(numbers_of(deltas)):
            return candidate
        with writing(Path("a file for the updates of a round")):
            kept = self._spill.put(deltas, norm_of(deltas), fingerprint_of(deltas))
        return replace(
            candidate,
            reply=replace(candidate.reply, deltas={}),
            update=replace(candidate.update, deltas=kept),
        )


def admit(
    transport: Transport,
    server_round: int,
    replies: Iterable[Message],
    intake: Intake,
) -> Admitted:
    """Read replies through the gate and keep the usable ones; the others are counted and journalled.

    ``intake`` knows what was asked of whom, and may have seen the replies arrive. The gate remembers nothing of these
    updates before :meth:`.update_gate.UpdateGate.learn` is called: a round that is skipped leaves no trace in what it
    compares with.
    """
    gate = transport.safety.gate
    found: dict[str, Candidate] = {}
    for message in replies:
        client_id = transport.client_of(message)
        if client_id is None or not message.has_content():
            continue
        try:
            if client_id in found:
                raise RefusedError("duplicate", "answers twice; its first answer counts")
            found[client_id] = intake.candidate(message, client_id)
        except RefusedError as error:
            transport.quarantine(client_id, server_round, error.check, str(error))
    for client_id, reason in sorted(gate.compare(found).items()):
        transport.quarantine(client_id, server_round, "size", reason)
        del found[client_id]
    shares = gate.shorten(found)
    for client_id, share in sorted(shares.items()):
        transport.event("shortened", round=server_round, client_id=client_id, to=round(share, 3))
    return Admitted({client_id: found[client_id] for client_id in sorted(found)}, shares)


def read_evaluations(
    transport: Transport, server_round: int, replies: Iterable[Message]
) -> list[EvaluateReply]:
    """Usable answers in client order; the others are journalled."""
    answers = []
    for message in replies:
        client_id = transport.client_of(message)
        if client_id is None or not message.has_content():
            continue
        try:
            reply = EvaluateReply.from_content(message.content)
            if reply.client_id != client_id:
                raise FederationError(f"answers as {reply.client_id}")
            if reply.type_key != transport.roster.clients[client_id].info.type_key:
                raise FederationError(f"answers as type {reply.type_key}")
            if reply.round != server_round:
                raise FederationError(f"answers round {reply.round} instead of {server_round}")
            answers.append(reply)
        except HeteroTuneError as error:
            transport.refuse(client_id, server_round, str(error))
    return sorted(answers, key=lambda reply: reply.client_id)
