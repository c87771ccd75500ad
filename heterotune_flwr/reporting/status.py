"""``heterotune status``: how a run stands, read from its journal while it goes on or after it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.jsons import as_mapping, as_number, as_whole, parse_json
from heterotune_flwr.names import printable

#: Rounds whose pace tells the time left.
_RECENT = 5
#: A running run that has written nothing for so long may be gone.
QUIET_SECONDS = 900.0
#: Clients that have a line each; of more, so many that failed most.
_ROWS, _WORST = 48, 5


@dataclass
class ClientStanding:
    """What the journal knows of one client; ``last_seen`` is seconds since 1970, None before its first answer."""

    client_id: str
    type_key: str = ""
    bits: str = ""
    examples: float | None = None
    last_seen: float | None = None
    last_round: int | None = None
    answers: int = 0
    failures: int = 0
    last_failure: str = ""


@dataclass
class Standing:
    """How a run stands.

    Times are seconds; ``eta`` is what is left of the strategy at work, ``phase`` what is done before its first round.
    """

    directory: str
    state: str
    reason: str | None = None
    strategy: str | None = None
    seed: int | None = None
    round: int = 0
    of: int = 0
    loss: float | None = None
    eta: float | None = None
    last_event: float | None = None
    phase: str | None = None
    clients: dict[str, ClientStanding] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def read_status(directory: Path) -> Standing:
    """Read a run directory (ConfigError when it is none)."""
    directory = directory.expanduser().absolute()
    journal = directory / "rounds.jsonl"
    try:
        if not journal.is_file():
            raise ConfigError(
                f"{directory} is no run directory: it has no rounds.jsonl (a run makes it when it begins; why one did "
                "not begin is in its log: flwr log)"
            )
        events = read_events(journal)
    except OSError as error:
        raise ConfigError(
            f"{journal} cannot be read: {error.strerror or error}; ask as the user whose run it is"
        ) from error
    state, reason = _state(directory)
    return follow(events, Standing(str(directory), state, reason))


def _state(directory: Path) -> tuple[str, str | None]:
    try:
        status = parse_json((directory / "status.json").read_text())
        return str(status["state"]), status.get("reason")
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", None


def follow(events: Iterable[Mapping[str, Any]], standing: Standing) -> Standing:
    """Bring a standing up to date with events of the journal, in order; what is malformed in them is passed over."""
    bits: dict[str, str] = {}
    ends: list[float] = []
    for event in events:
        kind, at = event["event"], as_number(event.get("time"))
        at = standing.last_event if at is None else at
        standing.last_event = at
        standing.phase = _phase(event, standing.phase)
        if kind == "describe":
            types = as_mapping(event.get("types"))
            bits = {key: str(as_mapping(of).get("bits", "")) for key, of in types.items()}
            for client_id, type_key in as_mapping(event.get("members")).items():
                _of_client(
                    standing.clients, {**event, "client_id": client_id, "type": type_key}, at, bits
                )
        elif kind in ("start", "resumed"):
            standing.strategy, standing.seed = event.get("strategy"), event.get("seed")
            standing.round, standing.of = as_whole(event.get("round")), as_whole(event.get("of"))
            standing.loss, ends = None, [] if at is None else [at]
        elif kind == "round":
            standing.round = as_whole(event.get("round"), standing.round)
            standing.loss = as_number(event.get("loss"))
            ends += [] if at is None else [at]
        elif kind == "guests":
            _mark_guests(standing.clients.values(), event.get("types"))
        _of_client(standing.clients, event, at, bits)
    if standing.state == "running" and len(ends) > 1:
        recent = ends[-_RECENT - 1 :]
        pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        standing.eta = pace * max(0, standing.of - standing.round)
    return standing


def _phase(event: Mapping[str, Any], before: str | None) -> str | None:
    """What a run is at before its first round; None once rounds are told."""
    kind = event["event"]
    if kind == "asking":
        return f"waiting for clients and asking who they are ({as_whole(event.get('needed'))} are needed)"
    if kind == "progress":
        done, of = as_whole(event.get("done")), as_whole(event.get("clients"))
        verb = "asking who the clients are" if event.get("what") == "asking" else "testing"
        return f"{verb}: {done} of {of} have answered"
    phases: dict[str, str | None] = {
        "journal": "starting",
        "describe": "making the maps of the clients' types",
        "aligning": "a client of each type reads the public anchors",
        "align": "the maps are there",
        "start": "testing the models before the first round",
        "evaluate": None,
        "train_reply": None,
        "round": None,
    }
    return phases.get(kind, before) if isinstance(kind, str) else before


def _mark_guests(clients: Iterable[ClientStanding], types: Any) -> None:
    """Guests own no examples; what they answered with counts the anchors of their lesson."""
    for client in clients:
        if isinstance(types, list) and client.type_key in types:
            client.examples = 0.0


def _of_client(
    clients: dict[str, ClientStanding],
    event: Mapping[str, Any],
    at: float | None,
    bits: Mapping[str, str],
) -> None:
    client_id = event.get("client_id")
    if event["event"] == "left_out" and not client_id:
        client_id = f"node {event.get('node_id')}"
    if client_id is None:
        return
    client = clients.setdefault(str(client_id), ClientStanding(str(client_id)))
    if event.get("type"):
        client.type_key = str(event["type"])
        client.bits = bits.get(client.type_key, client.bits)
    if event["event"] in ("client_failed", "refused", "left_out"):
        client.failures += 1
        client.last_failure = str(event.get("reason") or "")
    elif event["event"] in ("train_reply", "bytes"):
        client.last_seen, client.last_round = at, as_whole(event.get("round"))
        if event["event"] == "train_reply":
            client.answers += 1
            examples = as_number(event.get("examples"))
            client.examples = client.examples if examples is None else examples
    elif event["event"] == "describe":
        client.last_seen = at


def ago(seconds: float) -> str:
    """A length of time in its largest sensible unit."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def render(standing: Standing, now: float | None = None) -> str:
    """The standing as lines for a terminal."""
    now = time.time() if now is None else now
    head = f"{standing.directory}: {standing.state}"
    if standing.reason:
        head += f" ({standing.reason})"
    lines = [head]
    if standing.phase is not None and standing.state == "running":
        lines.append(standing.phase)
    if standing.strategy is not None:
        line = f"{standing.strategy}, seed {standing.seed}: round {standing.round} of {standing.of}"
        if standing.loss is not None:
            line += f", loss {standing.loss:.3f}"
        if standing.eta is not None:
            line += f", about {ago(standing.eta)} to go"
        lines.append(line)
    if standing.last_event is not None:
        quiet = now - standing.last_event
        line = f"last event {ago(quiet)} ago"
        if standing.state == "running" and quiet > QUIET_SECONDS:
            line += (
                f"; is the ServerApp alive? If not: run again with resume = {standing.directory}"
            )
        lines.append(line)
    few = len(standing.clients) <= _ROWS
    lines += _rows(standing, now) if few else _summary(standing)
    return "\n".join(printable(line.replace("\n", " ")) for line in lines)


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
                     f"{'failures':>8}  last seen")  # fmt: skip
    for client_id in sorted(standing.clients):
        client = standing.clients[client_id]
        seen = "never" if client.last_seen is None else f"{ago(now - client.last_seen)} ago"
        examples = "" if client.examples is None else f"{client.examples:.0f}"
        line = (f"{client_id:{width}}  {client.type_key:{kind}}  {client.bits:6} {examples:>8} {client.answers:>7} "
                f"{client.failures:>8}  {seen}")  # fmt: skip
        lines.append(line + (f"; {client.last_failure}" if client.last_failure else ""))
    return lines
