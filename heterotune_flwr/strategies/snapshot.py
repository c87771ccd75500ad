"""What of a strategy goes into a checkpoint, and back: everything the next round depends on.

What a strategy of one's own keeps between rounds is named in its ``remembered`` (or handled by ``state_dict`` and
``load_state_dict``, see :class:`.strategy.HeteroStrategy`); the shared tensors, the server optimizer, the channels, the
ledger, which maps clients hold and the last evaluation are saved for every strategy. Sampling and all random numbers
are functions of seed and round, so there is no generator to save. What clients keep for themselves stays with them
(:mod:`..tuning.client_state`), by round.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.checkpoint import Checkpoint, CheckpointError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.outcome import ClientRow
from heterotune_flwr.federation.resume import MAY_CHANGE, settings_digest

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy


def save(strategy: HeteroStrategy, round: int, evaluated: bool) -> None:
    """Write the round's checkpoint, where the run keeps any; ``evaluated``: its evaluation, if it has one, is done."""
    checkpoints = strategy.context.session.checkpoints
    if checkpoints is not None:
        checkpoints.save(
            strategy.context.name, strategy.context.seed, round, _take(strategy, evaluated)
        )
        strategy.transport.event("checkpoint", round=round, evaluated=evaluated)


def go_on(strategy: HeteroStrategy) -> tuple[int, bool]:
    """Put a prepared strategy where its last checkpoint was, when the run is resumed.

    Returns the last finished round and whether it was evaluated; (0, False) where there is nothing to go on from.

    Raises
    ------
    CheckpointError
        No checkpoint can be read, or it does not fit this run.

    """
    session = strategy.context.session
    if session.checkpoints is None or not session.resuming:
        return 0, False
    checkpoint, damaged = session.checkpoints.latest(strategy.context.name, strategy.context.seed)
    for reason in damaged:
        strategy.transport.event("checkpoint_damaged", reason=reason)
    if checkpoint is None:
        return 0, False
    _check_settings(strategy, checkpoint)
    _put_back(strategy, checkpoint.state, checkpoint.round)
    strategy.begin -= checkpoint.state["seconds"]
    evaluated = bool(checkpoint.state["evaluated"])
    strategy.transport.event(
        "resumed", round=checkpoint.round, of=strategy.rounds, evaluated=evaluated
    )
    return checkpoint.round, evaluated


def _take(strategy: HeteroStrategy, evaluated: bool) -> State:
    """Everything the next round depends on."""
    outcome = strategy.outcome
    return {
        "experiment": strategy.context.experiment,
        "settings": settings_digest(strategy.context.config, strategy.context.name),
        "shared": strategy.state,
        "memory": strategy.state_dict(),
        "channels": {channel.name: channel.state_dict() for channel in strategy.channels},
        "transport": strategy.transport.state_dict(),
        "maps": dict(strategy.maps.digests) if strategy.maps else {},
        "types": strategy.roster.type_keys,
        "outcome": {
            "rows": [row.to_json() for row in outcome.rows],
            "before": [row.to_json() for row in outcome.before],
            "peak_memory_mb": outcome.peak_memory_mb,
            "skipped": outcome.skipped,
        },
        "evaluated": evaluated,
        "seconds": time.monotonic() - strategy.begin,
    }


def _put_back(strategy: HeteroStrategy, state: State, round: int) -> None:
    """Make it what it was after ``round``; groups of types that are not there now are kept for when they return."""
    known = set(state["types"])
    _check_shapes(strategy, state["shared"], known)
    _check_maps(strategy, state["maps"])
    for group, tensors in state["shared"].items():
        strategy.state[group] = {**strategy.state.get(group, {}), **tensors}
    strategy.load_state_dict(state["memory"])
    for channel in strategy.channels:
        if channel.name in state["channels"]:
            channel.load_state_dict(state["channels"][channel.name])
    strategy.transport.load_state_dict(state["transport"])
    outcome, saved = strategy.outcome, state["outcome"]
    outcome.rows, outcome.before = (
        [ClientRow.from_json(row) for row in saved[name]] for name in ("rows", "before")
    )
    outcome.peak_memory_mb = saved["peak_memory_mb"]
    outcome.skipped = saved["skipped"]
    outcome.rounds = _rounds(strategy, round, bool(state["evaluated"]))


def _check_settings(strategy: HeteroStrategy, checkpoint: Checkpoint) -> None:
    """A checkpoint of another run, or of this one with other settings, is not gone on from."""
    context = strategy.context
    if checkpoint.state["settings"] != settings_digest(context.config, context.name):
        raise CheckpointError(
            f"{checkpoint.path} was written with other settings than config.yaml has now, or by a version of "
            f"heterotune-flwr that has other settings; a resumed run may change only {', '.join(MAY_CHANGE)}: "
            "put the others back"
        )


def _check_shapes(
    strategy: HeteroStrategy, shared: dict[str, dict[str, Any]], known: set[str]
) -> None:
    """Refuse tensors that the known types do not have as the checkpoint does; new types may bring more."""
    for group, tensors in strategy.state.items():
        for name, value in tensors.items():
            held = shared.get(group, {}).get(name)
            if held is None and (
                group not in shared or not strategy.groups.holders(group, name) & known
            ):
                continue
            if held is None or held.shape != np.shape(value):
                has = "is missing" if held is None else f"is {list(held.shape)}"
                raise CheckpointError(
                    f"the checkpoint does not fit: {name} of {group} {has} there, {list(np.shape(value))} now; the "
                    "clients or their backbones have changed"
                )


def _check_maps(strategy: HeteroStrategy, digests: dict[str, str]) -> None:
    """Another latent basis would make noise of the bank."""
    for type_key, digest in digests.items():
        now = strategy.maps.digests.get(type_key) if strategy.maps else None
        if now is not None and now != digest:
            others = ", ".join(sorted(digests))
            raise CheckpointError(
                f"the frozen maps of {type_key} are not those this run was trained with; restore the folder maps/ of "
                f"the run directory, or remove it and resume with clients of {others} alone (the maps are then made "
                "as at first), or start a new run"
            )


def _rounds(strategy: HeteroStrategy, round: int, evaluated: bool) -> list[dict[str, Any]]:
    """The outcome's rounds up to ``round``, out of the journal; of one told twice, the last."""
    name, seed = strategy.context.name, strategy.context.seed
    told: dict[tuple[int, str], dict[str, Any]] = {}
    for event in read_events(strategy.context.session.journal.path):
        kind = event["event"]
        mine = event.get("strategy") == name and event.get("seed") == seed
        if not mine or kind not in ("round", "evaluate") or event["round"] > round:
            continue
        if event["round"] == round and kind == "evaluate" and not evaluated:
            continue
        fields = {k: v for k, v in event.items() if k not in ("time", "of", "strategy", "seed")}
        told[event["round"], kind] = fields
    order = {"round": 0, "evaluate": 1}
    return [told[key] for key in sorted(told, key=lambda key: (key[0], order[key[1]]))]
