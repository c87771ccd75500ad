"""Every file of a deployment folder in one line, for its operator."""

from __future__ import annotations

from heterotune_flwr.deploy.keys import key_fingerprint
from heterotune_flwr.deploy.layout import Deployment, Node
from heterotune_flwr.deploy.registry import Outcome


def explain(deployment: Deployment) -> str:
    """What each file is for, which of them are secret, and how the nodes stand."""
    lines = [
        f"Deployment of heterotune-flwr; nodes reach it at {deployment.address}.",
        "",
        "ca/ca.crt             the CA certificate: by it nodes recognise the server (public)",
        "ca/ca.key             SECRET: signs server certificates; keep it off the server, put it back for --renew",
        "server/server.crt     the server's certificate, for nginx and the SuperLink (public)",
        "server/server.key     SECRET: the server certificate's key",
        "server/superexec.secret  SECRET: lets the SuperExec, and no other process, take runs from the SuperLink",
        "server/superlink.sh   starts the SuperLink on the loopback interface; .service: its systemd unit",
        "server/superexec.sh   starts the SuperExec, which starts the ServerApps; .service: its systemd unit",
        "server/nginx.conf     the proxy that lets nodes, and nothing else, in from outside",
        "server/nginx-restart.conf  lets systemd start nginx again when it has died",
        "server/public-keys/   the nodes' public keys, as registered",
        "server/state/         the SuperLink's database: registrations and runs; back it up",
        "operator/config.toml  Flower's connection: export FLWR_HOME to this folder",
        "runs/                 a place for run directories that the SuperExec may write to",
        "deployment.json       what these files were made from",
        "",
        "nodes/NAME/           copy it to that node, whole (then delete node.key here):",
        "  node.toml           what the node brings: backbone, memory, data; to be filled in there",
        "  node.key            SECRET: proves that the node is this node (absent if it made its own)",
        "  ca.crt              recognises the server",
        "  manifest.json       the server's code and library versions, for `heterotune node check`",
        "  start.sh            starts the node; heterotune-node.service: its systemd unit",
        "",
        *(f"node {name}: {_standing(node)}" for name, node in sorted(deployment.nodes.items())),
    ]
    return "\n".join(lines) + "\n"


def _standing(node: Node) -> str:
    known = f"id {node.node_id}" if node.node_id else "not registered yet"
    where = "revoked" if node.revoked else known
    return f"{key_fingerprint(node.public_key)}, {where}"


def describe(deployment: Deployment, outcome: Outcome) -> str:
    """What a registration has done, and what is left for the operator."""
    folder, nodes = deployment.folder, deployment.nodes
    again = f"heterotune deploy rotate-key {folder} NAME"
    revoked = sorted(name for name, node in nodes.items() if node.revoked)
    lines = [
        *(f"registered {name}, node id {nodes[name].node_id}" for name in outcome.registered),
        *(
            f"{name} was registered already, node id {nodes[name].node_id}"
            for name in outcome.found
        ),
        *(f"barred a key of {name} that may not be used any more" for name in outcome.barred),
        *(
            f"the key of {name} has been barred with flwr: it is revoked now"
            for name in outcome.lost
        ),
        *(f"error: {name}: {trouble}" for name, trouble in outcome.troubles.items()),
        *(
            f"WARNING: Flower also lets in node id {node_id}, which is not of this deployment; bar it with: "
            f"FLWR_HOME={deployment.operator} flwr supernode unregister {node_id} lab"
            for node_id in outcome.strangers
        ),
    ]
    if revoked:
        lines.append(f"revoked: {', '.join(revoked)} (let in again under a new key with: {again})")
    if len(revoked) < len(nodes) and not (outcome.registered or outcome.found or outcome.troubles):
        lines.append("every other node is registered" if revoked else "every node is registered")
    return "\n".join(lines or ["there is no node yet: heterotune deploy add-node"])
