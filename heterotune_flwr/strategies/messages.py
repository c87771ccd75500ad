"""A strategy's messages: what a client is sent in a training or a test, and what its answer is held against."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from heterotune_flwr.channels.channel import Purpose, ServerChannel
from heterotune_flwr.cmga import pull
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.federation.update_gate import Asked
from heterotune_flwr.federation.updates import Work
from heterotune_flwr.flower import Message
from heterotune_flwr.protocol.details import CLIENTS, COUNTS, TEXTS
from heterotune_flwr.protocol.messages import (
    EVALUATE,
    TRAIN,
    EvaluateRequest,
    Header,
    TrainRequest,
)
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.strategies.opening import closed_task

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy


def train_messages(
    strategy: HeteroStrategy, server_round: int, client_ids: Iterable[str]
) -> list[Message]:
    """One round's messages to some clients."""
    train, channels, messages = strategy.training(server_round), strategy.at_work(server_round), []
    for client_id in client_ids:
        type_key = strategy.type_of(client_id)
        purposes: set[Purpose] = {"train"}
        purposes.update(*(channel.purposes(server_round, type_key) for channel in channels))
        asked = payloads(channels, server_round, client_id, purposes)
        messages.append(train_message(strategy, client_id, server_round, train, asked))
    return messages


def train_message(
    strategy: HeteroStrategy,
    client_id: str,
    server_round: int,
    train: TrainConfig,
    channels: Mapping[str, Payload],
) -> Message:
    """One client's training."""
    digest, maps = strategy.transport.maps_for(client_id)
    request = TrainRequest(
        header=_header(strategy, server_round, client_id, train),
        tensors=strategy.outgoing(client_id),
        maps_digest=digest,
        maps=maps,
        expected=sorted(_trained_by(strategy, client_id, server_round)),
        frozen=sorted(strategy.frozen(strategy.type_of(client_id), server_round)),
        channels=channels,
    )
    return strategy.transport.message(client_id, request, TRAIN, server_round)


def test_messages(
    strategy: HeteroStrategy, server_round: int, asked: Mapping[str, list[str]], keep: bool
) -> list[Message]:
    """Tests asked of some clients (client id -> test sets); they may ``keep`` what they have by now.

    Of that test they may also tell what a report shows (:func:`details_asked`).
    """
    messages = []
    shown = shown_clients(strategy, asked) if keep else []
    for client_id, test_sets in asked.items():
        digest, maps = strategy.transport.maps_for(client_id)
        request = EvaluateRequest(
            _header(strategy, server_round, client_id, strategy.config.train),
            strategy.outgoing(client_id),
            digest,
            maps,
            test_sets,
            payloads(strategy.at_work(server_round), server_round, client_id, {"test"}),
            keep_as=strategy.context.name if keep else "",
            details=details_asked(strategy, client_id in shown) if keep else (),
        )
        messages.append(strategy.transport.message(client_id, request, EVALUATE, server_round))
    return messages


def details_asked(strategy: HeteroStrategy, shown: bool) -> list[str]:
    """What a client may tell of its last test: of a closed label set counts, else answers, where it is ``shown``."""
    if closed_task(strategy.roster.labels, strategy.config.train):
        return [COUNTS]
    return [TEXTS] if shown else []


def shown_clients(strategy: HeteroStrategy, client_ids: Iterable[str]) -> list[str]:
    """A few of the clients that are tested: the first of every type, then the second, ..."""
    of_type: dict[str, list[str]] = {}
    for client_id in client_ids:
        of_type.setdefault(strategy.type_of(client_id), []).append(client_id)
    places = {cid: (place, key) for key, own in of_type.items() for place, cid in enumerate(own)}
    return sorted(places, key=places.__getitem__)[:CLIENTS]


def payloads(
    channels: Iterable[ServerChannel],
    server_round: int,
    client_id: str,
    purposes: Collection[Purpose],
) -> dict[str, Payload]:
    """What some channels ask and bring in one message."""
    asked = {c.name: c.request(server_round, client_id, purposes) for c in channels}
    return {name: payload for name, payload in asked.items() if payload is not None}


def asked_of(
    strategy: HeteroStrategy, client_id: str, server_round: int, train: TrainConfig, examples: int
) -> Asked:
    """Against what a client's answer is checked; ``examples``: texts in use at most."""
    info = strategy.roster.clients[client_id].info
    shapes = strategy.client_shapes(client_id)
    trained = {n: shapes[n] for n in _trained_by(strategy, client_id, server_round)}
    return Asked(
        client_id=client_id,
        type_key=info.type_key,
        round=server_round,
        code_hash=info.code_hash,
        maps_digest=strategy.transport.maps_for(client_id)[0],
        shapes=trained,
        work=Work(
            examples, train.local_steps, train.learning_rate, train.optimizer, train.clip_norm,
            train.warmup_ratio, pull.MOST * strategy.roster.usual_examples,
        ),
        expected=strategy.transport.expected(trained),
        channels=[channel.name for channel in strategy.channels],
    )  # fmt: skip


def _trained_by(strategy: HeteroStrategy, client_id: str, server_round: int) -> list[str]:
    """Names of the shared tensors a client trains: from its lowest trained slot on, but for the frozen."""
    info = strategy.roster.clients[client_id].info
    held = strategy.frozen(info.type_key, server_round)
    names = strategy.groups.of[info.type_key]
    return [n for n in names if slot_of(n) >= info.lowest_slot and n not in held]


def _header(
    strategy: HeteroStrategy, server_round: int, client_id: str, train: TrainConfig
) -> Header:
    method, context = strategy.client_method(client_id), strategy.context
    return Header(context.experiment, context.seed, method, server_round, train)
