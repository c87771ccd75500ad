"""``heterotune status``: how a run stands, read from its journal while it goes on or after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, HeteroTuneError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.resume import going_on, run_state
from heterotune_flwr.jsons import as_mapping, parse_json
from heterotune_flwr.names import printable
from heterotune_flwr.reporting.standing import ClientStanding, Standing, follow
from heterotune_flwr.reporting.time_left import Plan

#: A running run that has written nothing for so long may be gone.
QUIET_SECONDS = 900.0
#: Clients that have a line each; of more, so many that failed most.
_ROWS, _WORST = 48, 5
#: Clients that are waited for and named.
_NAMED = 6


def read_status(directory: Path) -> Standing:
    """Read a run directory (ConfigError when it is none)."""
    directory = directory.expanduser().absolute()
    journal = directory / "rounds.jsonl"
    try:
        if not journal.is_file():
            if (directory / ".follower.lock").exists() or (directory / ".lock").exists():
                return Standing(str(directory), "starting", phase="the run has written nothing yet")
            raise ConfigError(
                f"{directory} is no run directory: it has no rounds.jsonl (a run makes it when it begins; why one did "
                "not begin is in its log: flwr log)"
            )
        events = read_events(journal)
    except OSError as error:
        raise ConfigError(
            f"{journal} cannot be read: {error.strerror or error}; ask as the user whose run it is"
        ) from error
    state, reason = run_state(directory, _status(directory), events)
    standing = Standing(str(directory), state, reason or None)
    if state in ("interrupted", "failed"):
        told = (event.get("simulated") for event in reversed(events) if event["event"] == "journal")
        standing.going_on = going_on(directory, next(told, True))
    return follow(events, standing, _plan(directory))


def _status(directory: Path) -> Mapping[str, Any]:
    """What ``status.json`` says; empty where it is missing or damaged."""
    try:
        return as_mapping(parse_json((directory / "status.json").read_text()))
    except (OSError, ValueError):
        return {}


def _plan(directory: Path) -> Plan | None:
    """What the run was configured to do; None where its configuration cannot be read (any more)."""
    try:
        return Plan.of(compose(str(directory / "config.yaml")))
    except (HeteroTuneError, OSError):
        return None


def ago(seconds: float) -> str:
    """A length of time in its largest sensible unit."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def doing(standing: Standing, now: float) -> str:
    """What a run does at the moment, and whom it waits for; empty where nothing is known."""
    if standing.asked:
        return _waiting(standing, now)
    text = standing.phase or ""
    if text and standing.last_event is not None and now - standing.last_event >= 2:
        text += f", for {ago(now - standing.last_event)}"
    return text


def _waiting(standing: Standing, now: float) -> str:
    testing = standing.doing == "testing"
    when = f"after round {standing.round}" if testing else f"round {standing.round + 1}"
    heard = standing.asked_of - len(standing.asked)
    text = f"{when}: {standing.doing}, {heard} of {standing.asked_of} answered"
    if standing.since is not None:
        text += f", {ago(now - standing.since)}"
    # Names come last: they are what a narrow screen may cut.
    text += "" if standing.patience is None else f" (at most {ago(standing.patience)})"
    return f"{text}; waiting for {_some(standing.asked)}"


def time_left(seconds: float | None) -> str:
    """``about 20 s left``; empty where nobody can tell, or it is over at any moment."""
    return "" if seconds is None or seconds < 1 else f"about {ago(seconds)} left"


def render(standing: Standing, now: float | None = None) -> str:
    """The standing as lines for a terminal."""
    now = time.time() if now is None else now
    head = f"{standing.directory}: {standing.state}"
    if standing.reason:
        head += f" ({standing.reason})"
    lines = [head]
    if standing.going_on:
        lines.append(f"go on with it: {standing.going_on}")
    if standing.strategy is not None:
        line = f"{standing.strategy}, seed {standing.seed}: round {standing.round} of {standing.of}"
        if standing.loss is not None:
            line += f", loss {standing.loss:.3f}"
        if standing.state == "running" and (left := time_left(standing.eta)):
            line += f", {left}"
        lines.append(line)
    if standing.state in ("running", "starting") and (at_work := doing(standing, now)):
        lines.append(at_work)
    if standing.last_event is not None:
        quiet = now - standing.last_event
        line = f"last event {ago(quiet)} ago"
        if standing.state == "running" and quiet > QUIET_SECONDS:
            line += (
                f"; is the ServerApp alive? If not: run again with resume = {standing.directory}"
            )
        lines.append(line)
    lines += _troubles(standing)
    few = len(standing.clients) <= _ROWS
    lines += _rows(standing, now) if few else _summary(standing)
    return "\n".join(printable(line.replace("\n", " ")) for line in lines)


def trouble(client: ClientStanding) -> str:
    """Why a client is out, or keeps failing, in one line."""
    if client.out:
        return f"{client.client_id} does not take part: {client.out}"
    times = "once" if client.in_a_row == 1 else f"{client.in_a_row} times in a row"
    if client.until is not None:
        return f"{client.client_id} sits out until after round {client.until}: failed {times}; {client.last_failure}"
    return f"{client.client_id} failed {times}: {client.last_failure}"


def _troubles(standing: Standing) -> list[str]:
    """Requests that expired, and who keeps failing."""
    lines = []
    late = sum(client.late for client in standing.clients.values())
    if late:
        names = [c.client_id for c in standing.clients.values() if c.late]
        lines.append(
            f"expired: {late} requests were not answered in time (of {_some(sorted(names))})"
        )
    failing = standing.failing
    lines += [trouble(client) for client in failing[:_WORST]]
    if len(failing) > _WORST:
        lines.append(f"and {len(failing) - _WORST} more")
    return lines


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _summary(standing: Standing) -> list[str]:
    """A line per type, and the clients that failed most: for more clients than anybody reads lines of."""
    found: dict[str, list[ClientStanding]] = {}
    for client in standing.clients.values():
        found.setdefault(client.type_key or "unknown type", []).append(client)
    lines = []
    for key, clients in sorted(found.items()):
        trained = sum(client.answers > 0 for client in clients)
        answers = sum(client.answers for client in clients)
        failures = sum(client.failures for client in clients)
        lines.append(
            f"{key}: {len(clients)} clients, {trained} have trained ({answers} answers), {failures} failures"
        )
    failed = [client for client in standing.clients.values() if client.failures]
    worst = sorted(failed, key=lambda client: (-client.failures, client.client_id))[:_WORST]
    lines += [f"  {one.client_id}: {one.failures} failures; {one.last_failure}" for one in worst]
    return lines


def _rows(standing: Standing, now: float) -> list[str]:
    """A line per client."""
    lines: list[str] = []
    width = max([len(cid) for cid in standing.clients] + [6])
    kind = max([len(client.type_key) for client in standing.clients.values()] + [4])
    if standing.clients:
        lines.append(f"{'client':{width}}  {'type':{kind}}  {'bits':6} {'examples':>8} {'answers':>7} "
                     f"{'failures':>8} {'expired':>7}  last seen")  # fmt: skip
    for client_id in sorted(standing.clients):
        client = standing.clients[client_id]
        seen = "never" if client.last_seen is None else f"{ago(now - client.last_seen)} ago"
        examples = "" if client.examples is None else f"{client.examples:.0f}"
        line = (f"{client_id:{width}}  {client.type_key:{kind}}  {client.bits:6} {examples:>8} {client.answers:>7} "
                f"{client.failures:>8} {client.late:>7}  {seen}")  # fmt: skip
        lines.append(line + (f"; {client.last_failure}" if client.last_failure else ""))
    return lines
