"""A strategy's tests: who is asked, who instead where a type's speaker fails, and the rows that come of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.federation import evaluation
from heterotune_flwr.federation.admission import read_evaluations
from heterotune_flwr.federation.kept import summary
from heterotune_flwr.federation.outcome import by_type, statistics
from heterotune_flwr.flower import ArrayRecord, ConfigRecord, Grid, Message, MetricRecord, Result
from heterotune_flwr.protocol.details import Details
from heterotune_flwr.protocol.messages import EVALUATE, EvaluateReply
from heterotune_flwr.strategies.messages import details_asked, test_messages

if TYPE_CHECKING:
    from heterotune_flwr.strategies.strategy import HeteroStrategy


def tested(strategy: HeteroStrategy) -> list[str]:
    """Ids of the clients that are tested, sorted."""
    wanted = strategy.config.server.evaluate_clients
    return evaluation.tested(strategy.roster, wanted, strategy.context.seed)


def planned(strategy: HeteroStrategy, server_round: int) -> list[Message]:
    """Ask for tests as :mod:`..federation.evaluation` plans them (all models are equal before round 1).

    In the last one clients choose what they take home.
    """
    differ = strategy.differ_after(server_round)
    keep = strategy.config.server.take_home and server_round == strategy.rounds
    asked = evaluation.plan(strategy.roster, differ, tested(strategy), keep)
    return test_messages(strategy, server_round, asked, keep)


def test(strategy: HeteroStrategy, server_round: int, grid: Grid, result: Result) -> None:
    """Test once; where a type's speaker fails, its other clients are asked in turn."""
    messages = list(strategy.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid))
    transport, roster, who = strategy.transport, strategy.roster, tested(strategy)
    collected = transport.collect(grid, messages, EVALUATE, server_round)
    tried = {evaluation.speaker(roster, key, who) or "" for key in roster.type_keys}
    while not strategy.differ_after(server_round):
        answers = read_evaluations(transport, server_round, collected)
        asked = evaluation.plan_again(roster, answers, who, tried)
        if not asked:
            break
        tried |= set(asked)
        messages = test_messages(strategy, server_round, asked, keep=False)
        collected += transport.collect(grid, messages, EVALUATE, server_round)
    record = strategy.aggregate_evaluate(server_round, collected)
    if record is None:
        strategy.outcome.rows = []  # an older evaluation must not pass for this one
    else:
        result.evaluate_metrics_clientapp[server_round] = record


def _details(
    strategy: HeteroStrategy, server_round: int, answers: list[EvaluateReply]
) -> dict[str, dict[str, Any]]:
    """What clients tell of their test beyond means, by client; what is not of its form is put on record."""
    labels, found = strategy.roster.labels or [], {}
    for reply in answers:
        if not reply.details:
            continue
        try:
            details = Details.from_text(
                reply.details, len(labels), details_asked(strategy, shown=True)
            )
            found[reply.client_id] = details.to_json(labels)
        except ExchangeError as error:
            strategy.transport.refuse(
                reply.client_id, server_round, str(error), "payload_refused", channel="details"
            )
    return found


def summarized(
    strategy: HeteroStrategy, server_round: int, answers: list[EvaluateReply]
) -> MetricRecord:
    """Make one row per client and journal the statistics."""
    differ, who = strategy.differ_after(server_round), tested(strategy)
    rows = evaluation.rows(strategy.roster, answers, differ, who)
    details = _details(strategy, server_round, answers)
    for row in rows:
        row.type_key = strategy.row_type(row.client_id)
        row.details = details.get(row.client_id)
    strategy.outcome.rows = rows
    if server_round == 0:
        strategy.outcome.before = rows
    for row in rows:
        if row.kept is not None:
            facts = {"round": server_round, "client_id": row.client_id, "type": row.type_key}
            strategy.transport.event("took_home", **facts, **row.kept.to_json())
    overall = statistics(rows)
    counts = {"tested": len(who), "clients": len(strategy.roster.clients)}
    entry = {"round": server_round, **counts, "types": by_type(rows), "overall": overall}
    if kept := summary(row.kept for row in rows):
        entry["kept"] = kept
    strategy.outcome.rounds.append({"event": "evaluate", **entry})
    strategy.transport.event("evaluate", of=strategy.rounds, **entry)
    return MetricRecord({key: float(value) for key, value in overall.items()})
