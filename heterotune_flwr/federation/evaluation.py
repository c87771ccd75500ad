"""Who is asked for which test, and how the answers become one row per client."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation.kept import Kept
from heterotune_flwr.federation.outcome import MEASURES, ClientRow
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.sampling import draw_tested
from heterotune_flwr.federation.update_gate import MOST_METRICS
from heterotune_flwr.protocol.messages import EvaluateReply
from heterotune_flwr.protocol.metrics import MEASURED, metric_of

#: Measures of a test that have bounds.
_BOUNDED = (*MEASURED, "error")
#: No loss of a model is larger.
_LARGEST_LOSS = 1e6


def check_tests(metrics: Mapping[str, float], scopes: Collection[str]) -> None:
    """Refuse results that no test can have, or of a test that was not asked for.

    They are a client's own word, and the means over all clients are made of them.

    Raises
    ------
    FederationError
        One line about the first thing that is wrong.

    """
    if len(metrics) > MOST_METRICS:
        raise FederationError(f"reports {len(metrics)} metrics, more than {MOST_METRICS}")
    for name, value in sorted(metrics.items()):
        _, scope, measure = metric_of(name)
        if scope and scope not in scopes:
            raise FederationError(f"reports {name}, which was not asked for")
        most = _LARGEST_LOSS if measure in ("loss", "error") else 1.0
        if not math.isfinite(value) or (measure in _BOUNDED and not 0 <= value <= most):
            raise FederationError(f"reports {name} = {value}")


def tested(roster: Roster, wanted: float | None, seed: int) -> list[str]:
    """Who is tested, sorted: all of a small federation, else a sample that a run's seed fixes."""
    members = {type_key: roster.of_type(type_key) for type_key in roster.type_keys}
    return draw_tested(members, wanted, seed)


def speaker(
    roster: Roster, type_key: str, who: Collection[str], tried: Collection[str] = ()
) -> str | None:
    """First client of a type that was not tried yet, those who are tested (``who``) before others; None: all were."""
    left = [cid for cid in roster.of_type(type_key) if cid not in tried]
    return next((cid for cid in left if cid in who), left[0] if left else None)


def plan(
    roster: Roster, models_differ: bool, who: Collection[str], keep: bool = False
) -> dict[str, list[str]]:
    """Client id -> tests asked of it.

    The personal test is asked of all of ``who`` that have one. Where all clients of a type hold the same
    model, its global test is asked of one of them only; where ``models_differ``, of all of ``who``. Where they
    ``keep`` models all of ``who`` are asked, for no test perhaps.
    """
    speakers = {speaker(roster, type_key, who) for type_key in roster.type_keys}
    asked: dict[str, list[str]] = {}
    for client_id in who:
        client = roster.clients[client_id]
        scopes = ["global"] if models_differ or client_id in speakers else []
        if client.info.personal_examples > 0:
            scopes.append("personal")
        if scopes or keep:
            asked[client_id] = scopes
    return asked


def plan_again(
    roster: Roster, replies: Iterable[EvaluateReply], who: Collection[str], tried: Collection[str]
) -> dict[str, list[str]]:
    """Whom to ask instead for every type whose global test nobody answered."""
    answered = {reply.type_key for reply in replies if "global_examples" in reply.metrics}
    missing = [type_key for type_key in roster.type_keys if type_key not in answered]
    following = [speaker(roster, type_key, who, tried) for type_key in missing]
    return {client_id: ["global"] for client_id in following if client_id is not None}


def rows(
    roster: Roster, replies: Iterable[EvaluateReply], models_differ: bool, who: Iterable[str]
) -> list[ClientRow]:
    """One row per client that is tested; a type's shared global result is attributed to all its clients."""
    metrics: dict[str, dict[str, float]] = {}
    took: dict[str, str] = {}
    shared: dict[str, Mapping[str, float]] = {}
    for reply in replies:
        metrics.setdefault(reply.client_id, {}).update(reply.metrics)
        took[reply.client_id] = took.get(reply.client_id, "") or reply.took
        if "global_examples" in reply.metrics:
            shared[reply.type_key] = reply.metrics
    result = []
    for client_id in who:
        client = roster.clients[client_id]
        own = metrics.get(client_id, {})
        common = own if models_differ else shared.get(client.info.type_key, {})
        row = ClientRow(client_id, client.info.type_key, client.info.train_examples)
        for name in MEASURES:
            setattr(row, name, (common if name.startswith("global_") else own).get(name))
        row.kept = Kept.of(took.get(client_id, ""), own)
        result.append(row)
    return result
