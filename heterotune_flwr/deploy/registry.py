"""Which nodes the running SuperLink lets in: registered, revoked, given a new key (through ``flwr supernode``)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from heterotune_flwr.deploy.files import make_folder
from heterotune_flwr.deploy.keys import PRIVATE, PUBLIC, key_fingerprint, new_node_key, read_public
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation.superlink import COMMAND_SECONDS, _parse_json

CONNECTION = "lab"


def flwr(deployment: Deployment, *arguments: str, named: bool = False) -> dict[str, Any]:
    """Run ``flwr ... lab --format json`` as the operator; ``named``: the arguments name the connection already.

    Raises
    ------
    FederationError
        The SuperLink does not answer, or refuses.

    """
    environment = {
        **os.environ,
        "FLWR_HOME": str(deployment.operator),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
    }
    connection = () if named else (CONNECTION,)
    command = [_flwr(), *arguments, *connection, "--format", "json"]
    with tempfile.TemporaryDirectory() as neutral:
        try:
            done = subprocess.run(
                command, env=environment, cwd=neutral, capture_output=True, text=True,
                timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FederationError(
                f"the SuperLink did not answer within {COMMAND_SECONDS:.0f} s"
            ) from error
    answer = _parse_json(done.stdout)
    if done.returncode != 0 or not answer.get("success"):
        detail = answer.get("error-message") or (done.stdout + done.stderr).strip()[-600:]
        raise FederationError(
            f"`flwr {' '.join(arguments[:2])}` failed: {' '.join(str(detail).split())} (does the SuperLink of "
            f"{deployment.server} run on this machine? start it with superlink.sh or its systemd unit)"
        )
    return answer


def _flwr() -> str:
    return str(Path(sys.executable).parent / "flwr")


def register(deployment: Deployment) -> list[str]:
    """Register every node that is not; returns their names."""
    done = []
    for name, node in sorted(deployment.nodes.items()):
        if node.node_id is None and not node.revoked:
            node.node_id = _register(deployment, name)
            deployment.save()
            done.append(name)
    return done


def _register(deployment: Deployment, name: str) -> str:
    answer = flwr(deployment, "supernode", "register", str(deployment.public_key(name)))
    return str(answer["node-id"])


def revoke(deployment: Deployment, name: str) -> None:
    """Bar a node: its key is refused from now on, a running SuperNode ends at its next heartbeat."""
    node = deployment.known(name)
    if node.node_id is not None:
        flwr(deployment, "supernode", "unregister", node.node_id)
    node.node_id, node.revoked = None, True
    deployment.save()


def rotate_key(deployment: Deployment, name: str, public_key: Path | None) -> str:
    """Give a node a new key, registered before the old one is barred; returns the new one's fingerprint.

    Parameters
    ----------
    deployment, name
        Whose key.
    public_key
        The new public key of a node that makes its own; None makes one in the node's folder here, where the old one
        is kept beside it as ``node.key.old``.

    """
    node = deployment.known(name)
    old_id = node.node_id
    if public_key is None:
        folder = make_folder(deployment.node(name))
        for old in (folder / PRIVATE, folder / PUBLIC):
            if old.exists():
                old.replace(old.with_name(f"{old.name}.old"))
        public_key = new_node_key(folder, name)
    line = read_public(public_key)
    deployment.refuse_double(name, line)
    node.public_key, node.node_id, node.revoked = line, None, False
    deployment.write()
    node.node_id = _register(deployment, name)
    deployment.save()
    if old_id is not None:
        flwr(deployment, "supernode", "unregister", old_id)
    return key_fingerprint(line)
