"""Private keys in a node's folder on the server: one that comes in, and those that must not stay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from heterotune_flwr.deploy.files import make_folder, present, remove
from heterotune_flwr.deploy.keys import PRIVATE, key_body, new_private, public_of, write_public

if TYPE_CHECKING:
    from heterotune_flwr.deploy.layout import Node

COMING = f"{PRIVATE}.new"
#: The second is of an older version.
_PRIVATE_FILES = (PRIVATE, f"{PRIVATE}.old")


def coming_key(folder: Path, name: str) -> str:
    """The public half of the key that is coming in; one that a call cut short has made will do."""
    coming = make_folder(folder) / COMING
    if not present(coming, "the new private key"):
        new_private(coming)
    return public_of(coming, name)


def finish(folder: Path, name: str, node: Node) -> None:
    """Put a node's new private key in its place if the deployment has recorded it (ConfigError)."""
    coming = folder / COMING
    if not present(coming, "the new private key"):
        return
    if key_body(public_of(coming, name)) == key_body(node.public_key):
        os.replace(coming, folder / PRIVATE)
        write_public(folder, name)


def discard(folder: Path, name: str, node: Node) -> None:
    """Remove private keys that were replaced, or never came to be used, from a node's folder here (ConfigError)."""
    replaced = node.keys - {key_body(node.public_key)}
    for path in (folder / file for file in _PRIVATE_FILES):
        if present(path, "the private key") and key_body(public_of(path, name)) in replaced:
            remove(path)
            remove(folder / path.name.replace(".key", ".pub"))
    remove(folder / COMING)
