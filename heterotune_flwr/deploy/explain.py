"""Every file of a deployment folder in one line, for its operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterotune_flwr.deploy.keys import key_fingerprint

if TYPE_CHECKING:
    from heterotune_flwr.deploy.layout import Deployment, Node


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
