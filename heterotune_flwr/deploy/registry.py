"""Which nodes the running SuperLink lets in: registered, found again, revoked (through ``flwr supernode``).

Flower is asked each time which keys it knows, by their contents: whatever was cut short, done with Flower's own
commands, or lost with its database, :func:`reconcile` finds out and mends.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.deploy.files import read_bytes, write_file
from heterotune_flwr.deploy.key_files import discard, finish
from heterotune_flwr.deploy.keys import body_of_pem, key_body
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.programs import flwr_json, plain_environment

CONNECTION = "lab"


def flwr(deployment: Deployment, *arguments: str, named: bool = False) -> dict[str, Any]:
    """Run ``flwr ... lab --format json`` as the operator; ``named``: the arguments name the connection already.

    Raises FederationError: the SuperLink does not answer, or refuses.
    """
    environment = {**plain_environment(), "FLWR_HOME": str(deployment.operator)}
    command = arguments if named else (*arguments, CONNECTION)
    with tempfile.TemporaryDirectory() as neutral:
        answer, trouble = flwr_json(*command, environment=environment, cwd=neutral)
    if trouble:
        # A refusal has a code; without one nobody has answered.
        hint = "" if "[code:" in trouble else _is_it_on(deployment)
        raise FederationError(f"`flwr {' '.join(arguments[:2])}` failed: {trouble}{hint}")
    return answer


def _is_it_on(deployment: Deployment) -> str:
    return (
        f" (does the SuperLink of {deployment.server} run on this machine? start it with superlink.sh or its "
        "systemd unit)"
    )


@dataclass(frozen=True)
class Listed:
    """What Flower has of a key: its node id, and whether it lets it in (a key that it bars it bars for ever)."""

    node_id: str
    live: bool


@dataclass
class Outcome:
    """What :func:`reconcile` has done; names of nodes, and at last ids of nodes that Flower knows and nobody else."""

    registered: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    barred: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)


def listed(deployment: Deployment) -> dict[str, Listed]:
    """Every key that Flower knows (FederationError when it does not answer)."""
    from heterotune_flwr.flower import registered_keys

    ca = read_bytes(deployment.server / "ca.crt", "the CA certificate", "heterotune deploy init")
    try:
        rows = registered_keys(f"127.0.0.1:{deployment.internal_port}", ca)
    except FederationError as error:
        raise FederationError(f"{error}{_is_it_on(deployment)}") from error
    return {body_of_pem(pem) or node_id: Listed(node_id, live) for node_id, pem, live in rows}


def reconcile(deployment: Deployment) -> Outcome:
    """Bring Flower and the deployment folder to agree: who is in, who is out.

    Registers what Flower does not have, takes up what it has under an unknown id, bars former and revoked keys that it
    lets in, and marks as revoked the nodes whose key it bars.

    Raises FederationError: the SuperLink does not answer. What concerns one node is in :attr:`Outcome.troubles`.
    """
    known, outcome = listed(deployment), Outcome()
    mine = {body for node in deployment.nodes.values() for body in node.keys}
    outcome.strangers = [
        entry.node_id for body, entry in known.items() if entry.live and body not in mine
    ]
    for name in sorted(deployment.nodes):
        try:
            settle(deployment, name, known, outcome)
        except HeteroTuneError as error:
            outcome.troubles[name] = str(error)
    return outcome


def settle(deployment: Deployment, name: str, known: dict[str, Listed], outcome: Outcome) -> None:
    """Bring one node to agree with Flower: its key first, then those it had before (FederationError)."""
    node, folder = deployment.nodes[name], deployment.node(name)
    finish(folder, name, node)
    entry = known.get(key_body(node.public_key))
    if node.revoked:
        pass
    elif entry is None:
        node.node_id = _register(deployment, name)
        outcome.registered.append(name)
    elif not entry.live:
        node.node_id, node.revoked = None, True
        outcome.lost.append(name)
    elif node.node_id != entry.node_id:
        node.node_id = entry.node_id
        outcome.found.append(name)
    deployment.save()
    if bar(deployment, name, known):
        outcome.barred.append(name)
    discard(folder, name, node)


def bar(deployment: Deployment, name: str, known: dict[str, Listed]) -> bool:
    """Bar the keys of a node that it may not use (any more); returns whether Flower let one of them in until now."""
    node = deployment.nodes[name]
    lines = [*node.former, *([node.public_key] if node.revoked else [])]
    found = [known[body] for line in lines if (body := key_body(line)) in known]
    live = [entry for entry in found if entry.live]
    for entry in live:
        flwr(deployment, "supernode", "unregister", entry.node_id)
    return bool(live)


def _register(deployment: Deployment, name: str) -> str:
    key = deployment.public_key(name)
    write_file(key, deployment.nodes[name].public_key)
    answer = flwr(deployment, "supernode", "register", str(key))
    return str(answer["node-id"])


def revoke(deployment: Deployment, name: str) -> None:
    """Bar a node: its keys are refused from now on, a running SuperNode ends at its next heartbeat."""
    node = deployment.known(name)
    known = listed(deployment)
    node.revoked = True
    bar(deployment, name, known)
    node.node_id = None
    deployment.save()
