"""Keys with which nodes prove who they are (Flower's node authentication: ECDSA, P-384, OpenSSH files)."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from heterotune_flwr.deploy.files import present, read_bytes, write_file, write_private
from heterotune_flwr.errors import ConfigError

PRIVATE, PUBLIC = "node.key", "node.pub"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


def check_node_name(name: str) -> str:
    """Refuse a name that cannot be a folder, a file and a unit (ConfigError)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a node: letters, digits, '-', '_', '.', at most 40, a letter or digit first"
        )
    return name


def how_to_make(folder: Path, name: str) -> str:
    """What a node's owner does to get a key."""
    given = name if _NAME.fullmatch(name) else "NAME"
    return f"make one with: heterotune node key {given} --dir {folder}, and give {given}.pub to the operator"


def new_private(path: Path) -> None:
    """Make a private key (0600); one that is there is never overwritten (ConfigError)."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )


def new_node_key(folder: Path, name: str) -> Path:
    """Make ``node.key`` (0600) and ``node.pub`` in a folder; returns the public file.

    Raises ConfigError: there is a key already; it is never overwritten.
    """
    new_private(folder / PRIVATE)
    return write_public(folder, name)


def write_public(folder: Path, name: str) -> Path:
    """Write the public half of a folder's private key beside it; returns the public file (ConfigError)."""
    public = folder / PUBLIC
    write_file(public, public_of(folder / PRIVATE, name))
    return public


def node_key(folder: Path, name: str) -> Path:
    """The public file of a folder's node key, which is made unless a call that was cut short has (ConfigError)."""
    if present(folder / PRIVATE, "the private key"):
        return write_public(folder, name)
    return new_node_key(folder, name)


def public_of(private: Path, name: str) -> str:
    """The public line of a private key file, whose contents go nowhere else.

    Raises ConfigError: the file cannot be read or is no such key.
    """
    mend = how_to_make(private.parent, name)
    raw = read_bytes(private, "the private key", mend)
    try:
        key = serialization.load_ssh_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{private} is no OpenSSH private key without a passphrase; move it away and {mend}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{private} is no elliptic-curve key; move it away and {mend}")
    return _public_line(key.public_key(), name)


def read_public(path: Path) -> str:
    """Read a public key file; refuses anything else, above all a private key.

    Raises ConfigError: it is not one public P-384 (or other NIST curve) key.
    """
    raw = read_bytes(path, "the public key", "ask the node for its NAME.pub")
    if b"PRIVATE KEY" in raw:
        raise ConfigError(
            f"{path} is a PRIVATE key: it must not leave its node; take the .pub file, and make the node a new key"
        )
    lines = [line for line in raw.splitlines() if line.strip()]
    if len(lines) > 1:
        raise ConfigError(f"{path} holds {len(lines)} lines; a public key file is one line")
    return check_public(lines[0].decode(errors="replace") if lines else "", str(path))


def check_public(line: str, where: str) -> str:
    """The line of a public key as it is kept; its comment loses what is not ASCII.

    Raises ConfigError: it is no public key of a NIST curve.
    """
    body, comment = " ".join(line.split()[:2]), " ".join(line.split()[2:])
    try:
        key = serialization.load_ssh_public_key(body.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{where} is no OpenSSH public key; take the NAME.pub that `heterotune node key` made"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"{where} is no elliptic-curve key, which Flower asks for; make one with: heterotune node key NAME"
        )
    return f"{body} {comment.encode('ascii', 'ignore').decode()}".strip() + "\n"


def key_body(line: str) -> str:
    """A public line without its comment: by it keys are compared."""
    return " ".join(line.split()[:2])


def body_of_pem(pem: bytes) -> str | None:
    """The same of a public key as Flower keeps it; None if it is no such key."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key_body(_public_line(key, "")) if isinstance(key, ec.EllipticCurvePublicKey) else None


def key_fingerprint(line: str) -> str:
    """SHA-256 fingerprint of a public line, as ``ssh-keygen -lf`` shows it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _public_line(key: ec.EllipticCurvePublicKey, name: str) -> str:
    line = key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()
    return f"{line} {name}\n"
