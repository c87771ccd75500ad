"""The update gate: which replies a strategy lets in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.federation.protocol import EvaluateReply, TrainReply
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.flower import Message
from heterotune_flwr.strategies.courier import Courier
from heterotune_flwr.strategies.updates import ClientUpdate, Work, as_update, check_update, outliers

Shapes = dict[str, tuple[int, ...]]


def admit(
    courier: Courier,
    roster: Roster,
    server_round: int,
    replies: Iterable[Message],
    asked: Callable[[str], tuple[Shapes, Work]],
) -> tuple[list[TrainReply], list[ClientUpdate]]:
    """Read replies and keep the usable ones, in client order; the others are journalled.

    ``asked`` gives, for a client id, the tensors expected of it and the work it was given.
    """
    reports: dict[str, TrainReply] = {}
    updates: dict[str, ClientUpdate] = {}
    for message in replies:
        client_id = courier.client_of(message)
        if client_id is None or not message.has_content():
            continue
        try:
            shapes, work = asked(client_id)
            reply = TrainReply.from_content(message.content, courier.expected(shapes))
            _check_sender(reply, client_id, server_round)
            if client_id in updates:
                raise FederationError("answers twice")
            update = as_update(reply, roster.clients[client_id].info.type_key, work)
            check_update(update, shapes)
        except HeteroTuneError as error:
            courier.refuse(client_id, server_round, str(error))
            continue
        reports[client_id], updates[client_id] = reply, update
    for client_id, reason in outliers(list(updates.values())).items():
        courier.refuse(client_id, server_round, reason)
        del reports[client_id], updates[client_id]
    return [reports[key] for key in sorted(reports)], [updates[key] for key in sorted(updates)]


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
            _check_sender(reply, client_id, server_round)
            answers.append(reply)
        except HeteroTuneError as error:
            courier.refuse(client_id, server_round, str(error))
    return sorted(answers, key=lambda reply: reply.client_id)


def _check_sender(reply: TrainReply | EvaluateReply, client_id: str, server_round: int) -> None:
    if reply.client_id != client_id:
        raise FederationError(f"answers as {reply.client_id}")
    if reply.round != server_round:
        raise FederationError(f"answers round {reply.round} instead of {server_round}")
