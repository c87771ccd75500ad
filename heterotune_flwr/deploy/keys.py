"""Keys with which nodes prove who they are (Flower's node authentication: ECDSA, P-384, OpenSSH files)."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from heterotune_flwr.deploy.files import read_bytes, write_file, write_private
from heterotune_flwr.errors import ConfigError

PRIVATE, PUBLIC = "node.key", "node.pub"


def new_node_key(folder: Path, name: str) -> Path:
    """Make ``node.key`` (0600) and ``node.pub`` in a folder; returns the public file.

    Raises
    ------
    ConfigError
        There is a key already; it is never overwritten.

    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(
        folder / PRIVATE,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    public = folder / PUBLIC
    write_file(public, _public_line(key.public_key(), name))
    return public


def public_of(private: Path, name: str) -> str:
    """The public line of a private key file, whose contents go nowhere else.

    Raises
    ------
    ConfigError
        The file cannot be read or is no such key.

    """
    raw = read_bytes(private, "the private key", "make one with: heterotune node key")
    try:
        key = serialization.load_ssh_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{private} is no OpenSSH private key without a passphrase; make one with: heterotune node key"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{private} is no elliptic-curve key; make one with: heterotune node key")
    return _public_line(key.public_key(), name)


def read_public(path: Path) -> str:
    """Read a public key file; refuses anything else, above all a private key.

    Raises
    ------
    ConfigError
        It is no public P-384 (or other NIST curve) key.

    """
    raw = read_bytes(path, "the public key", "ask the node for its node.pub")
    if b"PRIVATE KEY" in raw:
        raise ConfigError(
            f"{path} is a PRIVATE key: it must not leave its node; take the .pub file, and make the node a new key"
        )
    try:
        key = serialization.load_ssh_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no OpenSSH public key; take the node's node.pub") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"{path} is no elliptic-curve key, which Flower asks for; make one with: heterotune node key"
        )
    return raw.decode().strip() + "\n"


def key_fingerprint(line: str) -> str:
    """SHA-256 fingerprint of a public line, as ``ssh-keygen -lf`` shows it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _public_line(key: ec.EllipticCurvePublicKey, name: str) -> str:
    line = key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()
    return f"{line} {name}\n"
