"""The deployment folder: what is in it, and how it is made, extended and renewed.

=============================  =================================================================
``deployment.json``            server, nodes, their public keys and Flower's ids for them
``ca/``                        the certificate authority; its key signs server certificates only
``server/``                    what the server runs: SuperLink, SuperExec, nginx
``operator/config.toml``       Flower's connection, to use as FLWR_HOME
``nodes/NAME/``                exactly what is copied to that node
=============================  =================================================================

Keys are made once and never overwritten; everything else is written again by every command.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from heterotune_flwr import __version__
from heterotune_flwr.client.identity import code_hash
from heterotune_flwr.deploy import certificates, pairs, templates
from heterotune_flwr.deploy.explain import explain
from heterotune_flwr.deploy.files import (
    SCRIPT,
    contents,
    make_folder,
    own_folder,
    present,
    read_bytes,
    remove,
    unfinished,
    unwritten,
    write_file,
    write_private,
)
from heterotune_flwr.deploy.hosts import Address, is_address, parse_server
from heterotune_flwr.deploy.keys import (
    check_node_name,
    check_public,
    key_body,
    node_key,
    read_public,
)
from heterotune_flwr.deploy.values import check_days, check_path, check_ports, check_user
from heterotune_flwr.deploy.versions import installed_versions
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
    """A deployment folder in memory; :meth:`write` brings the folder up to date with it."""

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

    def write(self, days: float = certificates.SERVER_DAYS, renew: bool = False) -> None:
        """Make what is missing and write again what holds no key.

        Parameters
        ----------
        days
            Validity of a server certificate that is made now.
        renew
            Make a new server certificate (and key) although one is there; the CA stays, so nodes need nothing new.

        """
        self._tidy_folders()
        ca = pairs.authority(self.folder / "ca", self.server, self.hosts[0])
        pairs.server_pair(self.server, ca, self.hosts, days, renew)
        secret = self.server / "superexec.secret"
        if not present(secret, "the SuperExec's secret"):
            write_private(secret, secrets.token_hex(32).encode())
        self._server_files(ca.certificate)
        for name, node in self.nodes.items():
            write_file(self.public_key(name), node.public_key)
            if not node.revoked:
                self._node_files(name, ca.certificate)
        write_file(self.folder / "README.txt", explain(self))
        self.save()

    def _tidy_folders(self) -> None:
        """Make the folders, close them to others, and remove what killed calls have left in them."""
        closed = [
            self.folder,
            self.folder / "ca",
            self.server,
            self.operator,
            self.folder / "nodes",
        ]
        nodes = [self.node(name) for name, node in self.nodes.items() if not node.revoked]
        for folder in (*closed, *nodes):
            own_folder(folder)
        for folder in (self.server / "state", self.folder / "runs"):
            make_folder(folder)
        for folder in (*closed, *nodes, self.server / "public-keys"):
            for path in unfinished(folder):
                remove(path)

    def _server_files(self, ca: bytes) -> None:
        here, local = str(self.server), str(Path(sys.executable).parent)
        write_file(self.server / "ca.crt", ca)
        write_file(
            self.server / "superlink.sh",
            templates.superlink_script(local, self.internal_port),
            SCRIPT,
        )
        write_file(
            self.server / "superexec.sh",
            templates.superexec_script(local, self.internal_port),
            SCRIPT,
        )
        write_file(
            self.server / "heterotune-superlink.service", templates.superlink_unit(here, self.user)
        )
        write_file(
            self.server / "heterotune-superexec.service",
            templates.superexec_unit(here, self.user, str(self.folder / "runs")),
        )
        names = [host for host in self.hosts if not is_address(host)]
        write_file(
            self.server / "nginx.conf",
            templates.nginx_config(here, self.address, names, self.internal_port),
        )
        write_file(self.server / "nginx-restart.conf", templates.NGINX_RESTART)
        write_file(
            self.operator / "config.toml",
            templates.flower_config(
                str(self.operator), str(self.server / "ca.crt"), self.internal_port
            ),
        )

    def _node_files(self, name: str, ca: bytes) -> None:
        place = self.node(name)
        write_file(place / "ca.crt", ca)
        write_file(place / NODE_MANIFEST, json.dumps(self.manifest(ca), indent=2) + "\n")
        write_file(place / "start.sh", templates.node_script(self.node_bin), SCRIPT)
        write_file(
            place / "heterotune-node.service",
            templates.node_unit(self.node_folder, name, self.user),
        )
        if not present(place / "node.toml", "the settings"):  # its owner's from then on
            write_file(place / "node.toml", templates.node_toml(self.address, name))

    def manifest(self, ca: bytes) -> dict[str, Any]:
        """What a node compares itself with: the server's code, libraries and CA."""
        return {
            "server": str(self.address),
            "ca_sha256": certificates.fingerprint(
                certificates.load_certificate(ca, "the CA certificate")
            ),
            "heterotune": __version__,
            "code_hash": code_hash(),
            "versions": installed_versions(),
        }


def initialise(
    folder: Path,
    servers: Sequence[str],
    names: Sequence[str],
    public_keys: Mapping[str, str],
    days: float,
    renew: bool,
    **settings: Any,
) -> Deployment:
    """Make a deployment folder, or bring one up to date; nothing that holds a key is overwritten.

    Raises ConfigError: wrong input, or the folder belongs to something else.

    Parameters
    ----------
    folder
        Where.
    servers
        Hosts of the server; the first, with its port, is where nodes connect. Empty: as the folder has it.
    names
        Nodes whose keys are made here.
    public_keys
        Node name -> public key line of nodes that made their own.
    days, renew
        Of the server certificate, see :meth:`Deployment.write`.
    settings
        ``internal_port``, ``user``, ``node_folder``, ``node_bin``; None: as they are.

    """
    folder = folder.expanduser().absolute()
    given = {key: value for key, value in settings.items() if value is not None}
    deployment = _existing_or_new(folder, [parse_server(server) for server in servers], given)
    deployment.check()
    check_days(days)
    for name in (*names, *public_keys):
        deployment.has_node(name, public_keys.get(name))
    if not renew and (missing := pairs.missing_names(deployment.server, deployment.hosts)):
        raise ConfigError(
            f"the server certificate does not name {', '.join(missing)}; add --renew to make one that does"
        )
    make_folder(folder)
    # Not before everything was checked: what is refused changes nothing. And before anything else is made: a call
    # that is cut short can be given again.
    deployment.save()
    for name in names:
        deployment.add_node(name)
    for name, line in public_keys.items():
        deployment.add_node(name, line)
    deployment.write(days, renew)
    return deployment


def _existing_or_new(
    folder: Path, servers: Sequence[tuple[str, int | None]], settings: Mapping[str, Any]
) -> Deployment:
    """The deployment of a folder with changed settings, nothing of it written yet (ConfigError)."""
    hosts = [host for host, _ in servers]
    if present(folder / MANIFEST, "the deployment"):
        deployment = replace(Deployment.load(folder), **settings)
        if servers:
            deployment.hosts, deployment.port = hosts, servers[0][1] or deployment.port
        return deployment
    if not servers:
        raise ConfigError("say where nodes will find the server: --server HOST[:PORT]")
    if {*contents(folder)} - {*unfinished(folder)}:
        raise ConfigError(f"{folder} is not empty and no deployment; give a new folder")
    return Deployment(folder, hosts, servers[0][1] or 8443, **settings)
