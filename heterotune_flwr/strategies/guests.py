"""Guests: clients that own a model and no examples to train on. They learn after the last round, and nobody from them.

What a federation knows is in its bank and in what its clients predict. A guest takes the bank behind its own maps, and,
where the strategy has a consensus, then fits the predictions that everybody else made of *all* public anchors in the
last round, with whatever the strategy trains (distillation, arXiv 1503.02531). No private example is involved at any
time, and nothing that a guest learns reaches another type. A guest whose type has clients with examples takes what
its type shares instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterotune_flwr.federation.admission import Admitted, Intake, admit
from heterotune_flwr.federation.updates import check_step, mean_delta, training_summary
from heterotune_flwr.flower import Grid
from heterotune_flwr.protocol.messages import TRAIN
from heterotune_flwr.strategies.sharing import Assignment

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
    work = _assignments(strategy, types)
    pupils = [cid for key in work for cid in strategy.roster.of_type(key)]
    if not pupils:
        strategy.transport.event("guests", round=last, types=types, clients=0)
        return
    type_of = {cid: strategy.roster.clients[cid].info.type_key for cid in pupils}
    messages = [strategy.train_message(cid, last, work[type_of[cid]]) for cid in pupils]
    intake = Intake(
        strategy.transport, lambda cid: strategy.asked_of(cid, last, work[type_of[cid]])
    )
    replies = strategy.transport.collect(
        grid, messages, TRAIN, last, is_round=False, arrived=intake.arrived
    )
    admitted = admit(strategy.transport, last, replies, intake)
    _take_lesson(strategy, admitted, types)
    summary = training_summary(admitted.reports) if admitted.candidates else {"clients": 0}
    strategy.transport.event("guests", round=last, **(summary | {"types": types}))


def _take_bank(strategy: HeteroStrategy, types: list[str]) -> None:
    """Let the tensors that all types share be these types' own, with the values the others have reached."""
    strategy.fork_global(types)
    reached = strategy.for_guests()
    for key in types:
        group = strategy.state.setdefault(f"type/{key}", {})
        shared = {
            name for name in reached if name in group and strategy.scope(name, key) == "global"
        }
        group |= {name: reached[name].copy() for name in shared}


def _assignments(strategy: HeteroStrategy, types: list[str]) -> dict[str, Assignment]:
    """What the clients of each type are asked for; types nobody can teach are left out."""
    if strategy.consensus is None:
        return {}
    options, found = strategy.consensus.options, {}
    for key in types:
        lesson = strategy.consensus.guest_request(strategy.rounds + 1, key)
        if lesson.is_empty:
            continue
        found[key] = Assignment(
            steps=options.guest_steps,
            learning_rate=RATE_SHARE * strategy.config.train.learning_rate,
            lesson=lesson,
            examples=lesson.count,
        )
    return found


def _take_lesson(strategy: HeteroStrategy, admitted: Admitted, types: list[str]) -> None:
    """Average the guests of each type."""
    for key in types:
        group = f"type/{key}"
        own = [update for update in admitted.updates if update.type_key == key]
        own = [strategy.part_of(update, group) for update in own]
        own = [update for update in own if update.deltas]
        if own:
            step = mean_delta(own, strategy.context.mean)
            where = f"strategy {strategy.context.name}, guests of {key}"
            check_step(step, strategy.state[group], where)
            strategy.state[group] |= {n: strategy.state[group][n] + d for n, d in step.items()}
