"""Who gets past the update gate: replies in, usable updates out, the rest on record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.federation.protocol import EvaluateReply, TrainReply
from heterotune_flwr.flower import Message
from heterotune_flwr.strategies.courier import Courier
from heterotune_flwr.strategies.gate import Asked, Candidate, RefusedError
from heterotune_flwr.strategies.updates import ClientUpdate


@dataclass(frozen=True)
class Admitted:
    """The usable updates of a round by client id, in client order."""

    candidates: dict[str, Candidate]

    @property
    def reports(self) -> list[TrainReply]:
        """What the clients answered."""
        return [candidate.reply for candidate in self.candidates.values()]

    @property
    def updates(self) -> list[ClientUpdate]:
        """Their updates."""
        return [candidate.update for candidate in self.candidates.values()]


def admit(
    courier: Courier,
    server_round: int,
    replies: Iterable[Message],
    asked: Callable[[str], Asked],
) -> Admitted:
    """Read replies through the gate and keep the usable ones; the others are counted and journalled.

    ``asked`` says, for a client id, what was asked of it. The gate remembers nothing of these updates before
    :meth:`.gate.UpdateGate.learn` is called: a round that is skipped leaves no trace in what it compares with.
    """
    gate = courier.safety.gate
    found: dict[str, Candidate] = {}
    for message in replies:
        client_id = courier.client_of(message)
        if client_id is None or not message.has_content():
            continue
        try:
            if client_id in found:
                raise RefusedError("duplicate", "answers twice; its first answer counts")
            found[client_id] = gate.read(message.content, asked(client_id))
        except RefusedError as error:
            courier.quarantine(client_id, server_round, error.check, str(error))
    for client_id, reason in sorted(gate.compare(found).items()):
        courier.quarantine(client_id, server_round, "size", reason)
        del found[client_id]
    return Admitted({client_id: found[client_id] for client_id in sorted(found)})


def read_evaluations(
    courier: Courier, server_round: int, replies: Iterable[Message]
) -> list[EvaluateReply]:
    """Usable answers in client order; the others are journalled."""
    answers = []
    for message in replies:
        client_id = courier.client_of(message)
        if client_id is None or not message.has_content():
            continue
        try:
            reply = EvaluateReply.from_content(message.content)
            if reply.client_id != client_id:
                raise FederationError(f"answers as {reply.client_id}")
            if reply.round != server_round:
                raise FederationError(f"answers round {reply.round} instead of {server_round}")
            answers.append(reply)
        except HeteroTuneError as error:
            courier.refuse(client_id, server_round, str(error))
    return sorted(answers, key=lambda reply: reply.client_id)
