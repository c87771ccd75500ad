"""The deployment folder: what is in it, and what its record says of server and nodes; :mod:`.folder` writes it.

=============================  =================================================================
``deployment.json``            server, nodes, their public keys and Flower's ids for them
``ca/``                        the certificate authority; its key signs server certificates only
``server/``                    what the server runs: SuperLink, SuperExec, nginx
``operator/config.toml``       Flower's connection, to use as FLWR_HOME
``nodes/NAME/``                exactly what is copied to that node
=============================  =================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from heterotune_flwr import __version__
from heterotune_flwr.deploy.files import (
    make_folder,
    read_bytes,
    unwritten,
    write_file,
)
from heterotune_flwr.deploy.hosts import Address
from heterotune_flwr.deploy.keys import (
    check_node_name,
    check_public,
    key_body,
    node_key,
    read_public,
)
from heterotune_flwr.deploy.values import check_path, check_ports, check_user
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.jsons import parse_json

MANIFEST = "deployment.json"
_LOCK, LOCK_SECONDS = ".lock", 300.0
NODE_MANIFEST = "manifest.json"
#: Port of the SuperLink itself, on the server's loopback interface.
INTERNAL_PORT = 9093


@dataclass
class Node:
    """A node as the server knows it: its public key, Flower's id once registered, whether it is barred.

    ``former`` are the public keys it had before. They are kept for ever: whatever is cut short, and even when the
    SuperLink's database comes back from a backup, they are known and are barred again.
    """

    public_key: str
    node_id: str | None = None
    revoked: bool = False
    former: list[str] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Every public key it has or had, as :func:`.keys.key_body` writes them."""
        return {key_body(line) for line in (self.public_key, *self.former)}


@dataclass
class Deployment:
    """A deployment folder in memory; :func:`.folder.write_folder` brings the folder up to date with it."""

    folder: Path
    hosts: list[str]
    port: int
    internal_port: int = INTERNAL_PORT
    user: str = "heterotune"
    node_folder: str = "/opt/heterotune/node"
    node_bin: str = "/opt/heterotune/venv/bin"
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def address(self) -> Address:
        """Where nodes find the server."""
        return Address(self.hosts[0], self.port)

    @property
    def server(self) -> Path:
        """What the server runs."""
        return self.folder / "server"

    @property
    def operator(self) -> Path:
        """FLWR_HOME of the operator."""
        return self.folder / "operator"

    def node(self, name: str) -> Path:
        """What is copied to a node."""
        return self.folder / "nodes" / name

    def public_key(self, name: str) -> Path:
        """The server's copy of a node's public key."""
        return self.server / "public-keys" / f"{name}.pub"

    def check(self) -> None:
        """Refuse settings that the written files could not hold (ConfigError)."""
        check_path(str(self.folder), "the deployment folder")
        check_path(self.node_folder, "--node-dir")
        check_path(self.node_bin, "--node-bin")
        check_user(self.user)
        check_ports(self.hosts[0], self.port, self.internal_port)

    def known(self, name: str) -> Node:
        """Return a node by name (ConfigError naming those that exist)."""
        if name not in self.nodes:
            raise ConfigError(
                f"{self.folder} has no node {name!r}; nodes: {', '.join(sorted(self.nodes)) or 'none'}"
            )
        return self.nodes[name]

    @classmethod
    def load(cls, folder: Path) -> Deployment:
        """Read a deployment folder (ConfigError when it is none)."""
        folder = folder.expanduser().absolute()
        raw = read_bytes(
            folder / MANIFEST, "the deployment", "make one with: heterotune deploy init"
        )
        try:
            fields = parse_json(raw)
            fields.pop("version", None)
            nodes = {name: Node(**node) for name, node in fields.pop("nodes").items()}
            loaded = cls(folder=folder, nodes=nodes, **fields)
            if not loaded.hosts:
                raise ValueError("it names no host of the server")
            for name, node in nodes.items():
                for line in (node.public_key, *node.former):
                    check_public(line, f"a key of node {name!r}")
            return loaded
        except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            raise ConfigError(
                f"{folder / MANIFEST} is damaged: {error}; put it back from a backup"
            ) from error

    @classmethod
    @contextmanager
    def change(cls, folder: Path) -> Iterator[Deployment]:
        """Load for a change: another command waits, so that none writes over what the other has recorded."""
        cls.load(folder)
        try:
            lock = FileLock(folder.expanduser() / _LOCK, timeout=LOCK_SECONDS)
            lock.acquire()
        except Timeout as error:
            raise ConfigError(f"another command is changing {folder}; try again later") from error
        except OSError as error:
            raise ConfigError(unwritten("the lock", folder.absolute() / _LOCK, error)) from error
        try:
            yield cls.load(folder)
        finally:
            lock.release()

    def save(self) -> None:
        """Write ``deployment.json``."""
        fields = {key: value for key, value in asdict(self).items() if key != "folder"}
        text = json.dumps({"version": __version__, **fields}, indent=2) + "\n"
        write_file(self.folder / MANIFEST, text, 0o600)

    def add_node(self, name: str, public_key: str | None = None) -> bool:
        """Add a node; its key is made here unless its own public key is given. False: it was there.

        Raises ConfigError: as :meth:`has_node`.
        """
        if self.has_node(name, public_key):
            return False
        if public_key is None:
            public_key = read_public(node_key(make_folder(self.node(name)), name))
            self.refuse_double(name, public_key)
        self.nodes[name] = Node(public_key)
        return True

    def has_node(self, name: str, public_key: str | None = None) -> bool:
        """Whether there is a node of that name and, if one is given, with that key.

        Raises ConfigError: a name that cannot be a folder, one that has another key, or a key that another node has.
        """
        check_node_name(name)
        node = self.nodes.get(name)
        if node is None and public_key is not None:
            self.refuse_double(name, public_key)
        if node and public_key and key_body(node.public_key) != key_body(public_key):
            raise ConfigError(
                f"node {name!r} has another key; change it with: heterotune deploy rotate-key {self.folder} {name}"
            )
        return node is not None

    def refuse_double(self, name: str, public_key: str) -> None:
        """Refuse a public key that a node has or had: Flower takes no key twice (ConfigError)."""
        for other, node in self.nodes.items():
            if key_body(public_key) not in node.keys:
                continue
            if other == name:
                raise ConfigError(
                    f"this is a key that {name!r} has, or had, already; a new one is wanted: heterotune node key "
                    f"{name} --dir NEW-FOLDER"
                )
            raise ConfigError(
                f"{name!r} has the public key of node {other!r}; every node needs its own"
            )
