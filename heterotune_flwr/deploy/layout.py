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
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from heterotune_flwr import __version__
from heterotune_flwr.deploy import certificates, templates
from heterotune_flwr.deploy.certificates import Pair
from heterotune_flwr.deploy.explain import explain
from heterotune_flwr.deploy.files import SCRIPT, make_folder, read_bytes, write_file, write_private
from heterotune_flwr.deploy.hosts import Address, is_address, parse_server
from heterotune_flwr.deploy.keys import PUBLIC, new_node_key, read_public
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.identity import code_hash

MANIFEST = "deployment.json"
NODE_MANIFEST = "manifest.json"
#: Port of the SuperLink itself, on the server's loopback interface.
INTERNAL_PORT = 9093
#: Libraries whose versions a node compares with the server's.
LIBRARIES = ("flwr", "torch", "transformers", "peft", "bitsandbytes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class Node:
    """A node as the server knows it: its public key, Flower's id once registered, whether it is barred."""

    public_key: str
    node_id: str | None = None
    revoked: bool = False


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
            fields = json.loads(raw)
            fields.pop("version", None)
            nodes = {name: Node(**node) for name, node in fields.pop("nodes").items()}
            return cls(folder=folder, nodes=nodes, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{folder / MANIFEST} is damaged: {error}") from error

    def save(self) -> None:
        """Write ``deployment.json``."""
        fields = {key: value for key, value in asdict(self).items() if key != "folder"}
        text = json.dumps({"version": __version__, **fields}, indent=2) + "\n"
        write_file(self.folder / MANIFEST, text, 0o600)

    def add_node(self, name: str, public_key: str | None = None) -> bool:
        """Add a node; its key is made here unless its own public key is given. False: it was there.

        Raises
        ------
        ConfigError
            A name that cannot be a folder or host, or one that has another key.

        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a node: letters, digits, '-', '_', '.', at most 40, a letter or digit first"
            )
        if name in self.nodes:
            if (
                public_key is not None
                and self.nodes[name].public_key.split()[:2] != public_key.split()[:2]
            ):
                raise ConfigError(
                    f"node {name!r} has another key; change it with: heterotune deploy rotate-key {self.folder} {name}"
                )
            return False
        if public_key is None:
            place = make_folder(self.node(name))
            # A key that is there belongs to a call that was cut short.
            public = place / PUBLIC if (place / PUBLIC).exists() else new_node_key(place, name)
            public_key = read_public(public)
        self.refuse_double(name, public_key)
        self.nodes[name] = Node(public_key)
        return True

    def refuse_double(self, name: str, public_key: str) -> None:
        """Refuse a public key that a node has already (ConfigError)."""
        for other, node in self.nodes.items():
            if node.public_key.split()[:2] == public_key.split()[:2]:
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
        for folder in (
            self.folder,
            self.folder / "ca",
            self.server,
            self.operator,
            self.folder / "nodes",
        ):
            make_folder(folder)
            folder.chmod(0o700)
        authority = self._authority()
        self._server_certificate(authority, days, renew)
        if not (secret := self.server / "superexec.secret").exists():
            write_private(secret, secrets.token_hex(32).encode())
        make_folder(self.server / "state")
        make_folder(self.folder / "runs")
        self._server_files(authority.certificate)
        for name, node in self.nodes.items():
            write_file(self.public_key(name), node.public_key)
            if not node.revoked:
                self._node_files(name, authority.certificate)
        write_file(self.folder / "README.txt", explain(self))
        self.save()

    def _authority(self) -> Pair:
        certificate, key = self.folder / "ca" / "ca.crt", self.folder / "ca" / "ca.key"
        if not certificate.exists():
            if key.exists():
                raise ConfigError(
                    f"{key} has no certificate beside it; restore ca.crt, or start in a new folder"
                )
            made = certificates.new_authority(self.hosts[0])
            write_private(key, made.key)
            write_file(certificate, made.certificate)
        if not key.exists():  # kept elsewhere, as it should be
            return Pair(certificate.read_bytes(), b"")
        return Pair(certificate.read_bytes(), key.read_bytes())

    def _server_certificate(self, authority: Pair, days: float, renew: bool) -> None:
        certificate, key = self.server / "server.crt", self.server / "server.key"
        if certificate.exists() and key.exists() and not renew:
            names = certificates.names_of(
                certificates.load_certificate(certificate.read_bytes(), str(certificate))
            )
            if missing := sorted(set(self.hosts) - set(names)):
                raise ConfigError(
                    f"the server certificate does not name {', '.join(missing)}; add --renew"
                )
            return
        if not authority.key:
            raise ConfigError(
                f"a server certificate needs the CA's key; put it back: {self.folder / 'ca' / 'ca.key'}"
            )
        made = certificates.issue_server(authority, [*self.hosts, *_LOOPBACK], days)
        if key.exists():
            key.rename(key.with_suffix(".key.old"))
        write_private(key, made.key)
        write_file(certificate, made.certificate)

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
        place = make_folder(self.node(name))
        place.chmod(0o700)
        write_file(place / "ca.crt", ca)
        write_file(place / NODE_MANIFEST, json.dumps(self.manifest(ca), indent=2) + "\n")
        write_file(place / "start.sh", templates.node_script(self.node_bin), SCRIPT)
        write_file(
            place / "heterotune-node.service",
            templates.node_unit(self.node_folder, name, self.user),
        )
        if not (place / "node.toml").exists():  # its owner's from then on
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


def installed_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of libraries in this environment, ``missing`` for those that are not."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


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

    Raises
    ------
    ConfigError
        Wrong input, or the folder belongs to something else.

    """
    folder = folder.expanduser().absolute()
    given = {key: value for key, value in settings.items() if value is not None}
    parsed = [parse_server(server) for server in servers]
    if (folder / MANIFEST).exists():
        deployment = Deployment.load(folder)
        for key, value in given.items():
            setattr(deployment, key, value)
        if parsed:
            deployment.hosts = [host for host, _ in parsed]
            deployment.port = parsed[0][1] or deployment.port
    else:
        if not parsed:
            raise ConfigError("say where nodes will find the server: --server HOST[:PORT]")
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and no deployment; give a new folder")
        deployment = Deployment(folder, [host for host, _ in parsed], parsed[0][1] or 8443, **given)
    make_folder(folder)
    deployment.save()  # a call that is cut short can be given again
    for name in names:
        deployment.add_node(name)
    for name, line in public_keys.items():
        deployment.add_node(name, line)
    deployment.write(days, renew)
    return deployment
