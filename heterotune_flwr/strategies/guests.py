"""Guests: clients that own a model and no examples to train on. They learn after the last round, and nobody from them.

What a federation knows is in its bank and in what its clients predict. A guest takes the bank behind its own maps, and,
where the strategy has a channel that teaches, then fits what everybody else made of *all* public texts in the last
round, with whatever the strategy trains (distillation, arXiv 1503.02531). No private example is involved at any
time, and nothing that a guest learns reaches another type. A guest whose type has clients with examples takes what
its type shares instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from heterotune_flwr.channels.channel import ServerChannel, Unlabelled
from heterotune_flwr.federation.admission import Admitted, Intake, admit
from heterotune_flwr.federation.updates import check_step, mean_delta, training_summary
from heterotune_flwr.flower import Grid
from heterotune_flwr.protocol.messages import TRAIN
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.strategies.messages import asked_of, payloads, train_message

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy

#: Share of the strategy's learning rate that a guest begins with: what suits many short rounds is much for a long one.
RATE_SHARE = 0.5


def waiting(strategy: HeteroStrategy) -> bool:
    """Whether there are types of guests alone that have not been taught after the last round."""
    return bool(strategy.roster.guest_types) and strategy.taught != strategy.rounds


def teach(strategy: HeteroStrategy, grid: Grid) -> None:
    """Give the types of guests alone what the others have learnt; once after a strategy's last round."""
    types, last = strategy.roster.guest_types, strategy.rounds
    if not waiting(strategy):
        return
    _take_bank(strategy, types)
    strategy.taught = last
    teacher = next((channel for channel in strategy.channels if channel.teaches), None)
    work = _work(teacher, last, types)
    pupils = [cid for key in work for cid in strategy.roster.of_type(key)]
    if not pupils:
        strategy.transport.event("guests", round=last, types=types, clients=0)
        return

    def training(client_id: str) -> tuple[TrainConfig, int]:
        asked, train = work[strategy.type_of(client_id)], strategy.config.train
        rate = RATE_SHARE * train.learning_rate
        return replace(train, local_steps=asked.steps, learning_rate=rate), asked.examples

    messages = [
        train_message(
            strategy,
            cid,
            last,
            training(cid)[0],
            payloads(strategy.channels, last + 1, cid, {"unlabelled", "fit"}),
        )
        for cid in pupils
    ]
    intake = Intake(strategy.transport, lambda cid: asked_of(strategy, cid, last, *training(cid)))
    replies = strategy.transport.collect(
        grid, messages, TRAIN, last, is_round=False, arrived=intake.arrived
    )
    admitted = admit(strategy.transport, last, replies, intake)
    _take_updates(strategy, admitted, types)
    summary = training_summary(admitted.reports) if admitted.candidates else {"clients": 0}
    strategy.transport.event("guests", round=last, **(summary | {"types": types}))


def _take_bank(strategy: HeteroStrategy, types: list[str]) -> None:
    """Let the tensors that all types share be these types' own, with the values the others have reached."""
    strategy.groups.fork_global(types)
    reached = strategy.for_guests()
    for key in types:
        group = strategy.state.setdefault(f"type/{key}", {})
        shared = {
            name for name in reached if name in group and strategy.scope(name, key) == "global"
        }
        group |= {name: reached[name].copy() for name in shared}


def _work(teacher: ServerChannel | None, last: int, types: list[str]) -> dict[str, Unlabelled]:
    """What the clients of each type are asked for; types nobody can teach are left out."""
    if teacher is None:
        return {}
    found = {key: teacher.unlabelled(last + 1, key) for key in types}
    return {key: work for key, work in found.items() if work is not None}


def _take_updates(strategy: HeteroStrategy, admitted: Admitted, types: list[str]) -> None:
    """Average the guests of each type."""
    for key in types:
        group = f"type/{key}"
        own = [update for update in admitted.updates if update.type_key == key]
        own = [strategy.groups.part_of(update, group) for update in own]
        own = [update for update in own if update.deltas]
        if own:
            step = mean_delta(own, strategy.context.mean)
            where = f"strategy {strategy.context.name}, guests of {key}"
            check_step(step, strategy.state[group], where)
            strategy.groups.apply({group: step})
