"""What a strategy writes down: the journal's events of a run and its rounds, and the outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from heterotune_flwr.channels.channel import Aggregated
from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation.outcome import statistics

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy


def begin(strategy: HeteroStrategy) -> None:
    """Say what is about to run."""
    strategy.transport.event(
        "start",
        of=strategy.rounds,
        clients=len(strategy.roster.clients),
        shared={group: len(tensors) for group, tensors in strategy.state.items()},
    )


def told(
    strategy: HeteroStrategy, channel: str, server_round: int, aggregated: Aggregated
) -> dict[str, Any]:
    """Put on record what a channel refuses and finds; returns its part of the round's summary."""
    transport = strategy.transport
    for note in aggregated.notes:
        facts = {"round": server_round, "channel": channel, "text": note.text, **note.facts}
        transport.event("channel_note", **facts)
    for client_id, reason in sorted(aggregated.refused.items()):
        transport.safety.gate.count(client_id, channel)
        transport.refuse(client_id, server_round, reason, "payload_refused", channel=channel)
    return dict(aggregated.log)


def skip(strategy: HeteroStrategy, server_round: int, usable: int) -> None:
    """A round had too few usable updates."""
    needed = strategy.config.server.min_results
    strategy.outcome.skipped.append(server_round)
    strategy.transport.event("skipped", round=server_round, usable=usable, needed=needed)


def end_round(strategy: HeteroStrategy, server_round: int, summary: Mapping[str, Any]) -> None:
    """A round's numbers, in the journal and the outcome."""
    ledger, outcome = strategy.transport.ledger, strategy.outcome
    entry = {
        "round": server_round,
        **summary,
        **strategy.round_log(),
        "bytes_up": ledger.train_up,
        "bytes_down": ledger.train_down,
    }
    peak = summary.get("peak_memory_mb")
    if peak is not None:
        outcome.peak_memory_mb = max(outcome.peak_memory_mb or 0.0, peak)
    outcome.rounds.append({"event": "round", **entry})
    strategy.transport.event("round", of=strategy.rounds, **entry)


def check_progress(strategy: HeteroStrategy, server_round: int, progressed: bool) -> None:
    """Give up when round after round brings nothing: the same error would repeat for ever (FederationError)."""
    strategy.empty_rounds = 0 if progressed else strategy.empty_rounds + 1
    patience, empty = strategy.config.server.give_up_after, strategy.empty_rounds
    if patience and empty >= min(patience, strategy.rounds):
        reason = strategy.transport.first_failure or "nobody failed; too few were asked"
        needed = strategy.config.server.min_results
        missing = "no usable update" if needed == 1 else f"fewer than {needed} usable updates"
        raise FederationError(
            f"{strategy.context.name}, round {server_round}: {missing} in {empty} rounds; first reason: {reason}"
        )


def finish(strategy: HeteroStrategy, seconds: float) -> None:
    """Fill the outcome with what the whole run came to."""
    outcome, roster, transport = strategy.outcome, strategy.roster, strategy.transport
    outcome.seconds = seconds
    outcome.population = len(roster.clients)
    outcome.refused = transport.safety.gate.counts
    outcome.bytes = transport.ledger.summary(
        roster.per_type("lora16_bytes"),
        roster.per_type("model_bytes"),
        {key: len(roster.of_type(key)) for key in roster.type_keys},
    )
    if strategy.maps is not None:
        outcome.alignment = {"quality": strategy.maps.quality}
    transport.event("strategy_end", seconds=seconds, overall=statistics(outcome.rows))
