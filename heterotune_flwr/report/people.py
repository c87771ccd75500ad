"""Model types and clients of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from heterotune_flwr.federation.journal import client_of
from heterotune_flwr.jsons import as_list, as_mapping, as_number, as_whole, whole_or_none
from heterotune_flwr.report.facts import ClientFacts, TypeFacts
from heterotune_flwr.report.files import Key, RunFiles, key_of


def types(files: RunFiles) -> list[TypeFacts]:
    """Types as their clients described them; of a run that got no answer those configured."""
    found: dict[str, TypeFacts] = {}
    for event in files.of("describe"):
        for key, facts in as_mapping(event.get("types")).items():
            found[key] = _type(key, as_mapping(facts))
    if not found:
        for entry in map(as_mapping, as_list(files.config.get("types"))):
            key = f"{entry.get('backbone')}@{entry.get('bits')}"
            found[key] = _type(key, entry)
    guests = guest_types(files)
    reasons = {str(e.get("type")): str(e.get("reason") or "") for e in files.of("apart")}
    for key, one in found.items():
        one.guest, one.apart = key in guests, reasons.get(key, "")
    return [found[key] for key in sorted(found)]


def _type(key: str, facts: Mapping[str, Any]) -> TypeFacts:
    return TypeFacts(
        key,
        backbone=key.partition("@")[0],
        bits=str(facts.get("bits") or ""),
        clients=as_whole(facts.get("clients")),
        hidden=whole_or_none(facts.get("hidden")),
        layers=whole_or_none(facts.get("layers")),
        parameters=whole_or_none(facts.get("parameters")),
        model_bytes=whole_or_none(facts.get("model_bytes")),
        lora16_bytes=whole_or_none(facts.get("lora16_bytes")),
    )


def guest_types(files: RunFiles) -> set[str]:
    """Types none of whose clients trains on examples."""
    told = {str(key) for event in files.of("guests") for key in as_list(event.get("types"))}
    rows = [as_mapping(r) for run in files.results.values() for r in as_list(run.get("clients"))]
    learned = {str(r.get("type")) for r in rows if as_whole(r.get("examples"), 1)}
    return told | {str(r.get("type")) for r in rows} - learned


def clients(files: RunFiles) -> list[ClientFacts]:
    """Every client that was ever heard of, by id."""
    found: dict[str, ClientFacts] = {}
    guests = guest_types(files)
    strategy: Key | None = None
    for place, event in enumerate(files.events):
        _count(found, event)  # also what was done again: it all happened
        if event["event"] == "start" and key_of(event) != strategy:
            strategy = key_of(event)
            _begin(found.values())
        if place not in files.undone:
            _stand(found, event)
    for run in files.results.values():
        for row in map(as_mapping, as_list(run.get("clients"))):
            client = _client(found, str(row.get("client_id")), row.get("type"))
            if (examples := whole_or_none(row.get("examples"))) is not None:
                client.examples = examples
            mix = as_mapping(row.get("details")).get("label_mix")
            if isinstance(mix, Mapping):
                client.label_mix = {str(k): as_whole(v) for k, v in mix.items()}
    for client in found.values():
        client.guest = client.type_key in guests
    return [found[client_id] for client_id in sorted(found)]


def _client(found: dict[str, ClientFacts], client_id: str, type_key: Any = None) -> ClientFacts:
    client = found.setdefault(client_id, ClientFacts(client_id))
    client.type_key = str(type_key) if type_key else client.type_key
    return client


def _begin(found: Iterable[ClientFacts]) -> None:
    """A strategy of its own asks everybody again, but for those who do not take part."""
    for client in found:
        if client.state != "left_out":
            client.state, client.why = "in", ""


def _named(found: dict[str, ClientFacts], event: Mapping[str, Any]) -> ClientFacts | None:
    """The client that an event is about."""
    client_id = client_of(event)
    return None if client_id is None else _client(found, client_id, event.get("type"))


def _stand(found: dict[str, ClientFacts], event: Mapping[str, Any]) -> None:
    """Whether a client is in, and why not."""
    kind, client = event["event"], _named(found, event)
    if client is None:
        return
    reason = str(event.get("reason") or "")
    if kind in ("client_failed", "refused") and client.state != "cooldown":
        client.state, client.why = "lost", reason
    elif kind == "left_out":
        client.state, client.why = "left_out", reason
    elif kind == "cooldown":
        client.state = "cooldown"
        again = f"failed too often, not asked until after round {event.get('until')}"
        client.why = f"{again}; last: {client.why}" if client.why else again
    elif kind in ("returned", "train_reply"):
        client.state, client.why = "in", ""


def _count(found: dict[str, ClientFacts], event: Mapping[str, Any]) -> None:
    """What a client did and had."""
    kind = event["event"]
    if kind == "describe":
        examples = as_mapping(event.get("examples"))
        for member, type_key in as_mapping(event.get("members")).items():
            one = _client(found, str(member), type_key)
            if (count := whole_or_none(examples.get(member))) is not None:
                one.examples = count
    client = _named(found, event)
    if client is None:
        return
    client.failures += kind == "client_failed"
    client.refusals += kind in ("refused", "payload_refused")
    client.cooldowns += kind == "cooldown"
    if kind == "bytes":
        client.bytes_up += as_whole(event.get("up"))
        client.bytes_down += as_whole(event.get("down"))
    elif kind == "train_reply":
        _trained(client, event)


def _trained(client: ClientFacts, event: Mapping[str, Any]) -> None:
    client.answers += 1
    if (peak := as_number(event.get("peak_memory_mb"))) is not None:
        client.peak_memory_mb = max(client.peak_memory_mb or 0.0, peak)
    if (seconds := as_number(event.get("seconds"))) is not None:
        client.train_seconds = (client.train_seconds or 0.0) + seconds
    if client.examples is None:
        client.examples = whole_or_none(event.get("examples"))
