"""A new key for a node. The old one is known, and barred by whatever comes next, from before the new one is let in.

1. The new private key is made beside the old one (``node.key.new``), unless the node makes its own.
2. The deployment records at once: this is the node's key, and that is one it had before.
3. The private key takes its place, Flower registers the new key and bars the old one (:func:`.registry.settle`).

A rotation that is cut short before the second step has changed nothing; after it, ``heterotune deploy register`` or
another rotation does the rest, and ``revoke-node`` bars both keys.
"""

from __future__ import annotations

from pathlib import Path

from heterotune_flwr.deploy.folder import write_folder
from heterotune_flwr.deploy.key_files import coming_key, finish
from heterotune_flwr.deploy.keys import key_body, key_fingerprint, read_public
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.registry import Outcome, listed, settle
from heterotune_flwr.errors import ConfigError


def rotate_key(deployment: Deployment, name: str, public_key: Path | None) -> str:
    """Give a node a new key, registered before the old one is barred; returns the new one's fingerprint.

    ``public_key`` is that of a node that makes its own; None makes one in the node's folder here.

    Raises ConfigError: the key is not new; FederationError: the SuperLink does not answer: then nothing has changed; or
    it refuses.
    """
    node = deployment.known(name)
    known = listed(deployment)
    finish(deployment.node(name), name, node)
    line = (
        coming_key(deployment.node(name), name) if public_key is None else read_public(public_key)
    )
    deployment.refuse_double(name, line)
    if (entry := known.get(key_body(line))) and not entry.live:
        raise ConfigError("Flower has barred this key, and takes none twice; make a new one")
    node.former.append(node.public_key)
    node.public_key, node.node_id, node.revoked = line, None, False
    deployment.save()
    settle(deployment, name, known, Outcome())
    write_folder(deployment)
    return key_fingerprint(line)
