"""A deployment folder made, extended and renewed.

Keys are made once and never overwritten; everything else is written again by every command.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heterotune_flwr import __version__
from heterotune_flwr.deploy import certificates, pairs, templates
from heterotune_flwr.deploy.explain import explain
from heterotune_flwr.deploy.files import (
    SCRIPT,
    contents,
    make_folder,
    own_folder,
    present,
    remove,
    unfinished,
    write_file,
    write_private,
)
from heterotune_flwr.deploy.hosts import is_address, parse_server
from heterotune_flwr.deploy.layout import MANIFEST, NODE_MANIFEST, Deployment
from heterotune_flwr.deploy.values import check_days
from heterotune_flwr.deploy.versions import installed_versions
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.program_version import code_hash


def write_folder(
    deployment: Deployment, days: float = certificates.SERVER_DAYS, renew: bool = False
) -> None:
    """Make what is missing and write again what holds no key.

    A server certificate that is made now is good for ``days``. With ``renew`` a new one (and its key) is made although
    one is there; the CA stays, so nodes need nothing new.
    """
    server = deployment.server
    _tidy(deployment)
    ca = pairs.authority(deployment.folder / "ca", server, deployment.hosts[0])
    pairs.server_pair(server, ca, deployment.hosts, days, renew)
    secret = server / "superexec.secret"
    if not present(secret, "the SuperExec's secret"):
        write_private(secret, secrets.token_hex(32).encode())
    _write_server(deployment, ca.certificate)
    for name, node in deployment.nodes.items():
        write_file(deployment.public_key(name), node.public_key)
        if not node.revoked:
            _write_node(deployment, name, ca.certificate)
    write_file(deployment.folder / "README.txt", explain(deployment))
    deployment.save()


def _tidy(deployment: Deployment) -> None:
    """Make the folders, close them to others, and remove what killed calls have left in them."""
    folder, server = deployment.folder, deployment.server
    closed = [folder, folder / "ca", server, deployment.operator, folder / "nodes"]
    closed += [deployment.node(name) for name, node in deployment.nodes.items() if not node.revoked]
    for place in closed:
        own_folder(place)
    for place in (server / "state", folder / "runs"):
        make_folder(place)
    for place in (*closed, server / "public-keys"):
        for path in unfinished(place):
            remove(path)


def _write_server(deployment: Deployment, ca: bytes) -> None:
    server, operator, runs = deployment.server, deployment.operator, deployment.folder / "runs"
    port, address = deployment.internal_port, deployment.address
    start = {"bin": str(Path(sys.executable).parent), "port": port}
    unit = {"here": server, "user": deployment.user}
    names = " ".join(host for host in deployment.hosts if not is_address(host)) or "_"
    write_file(server / "ca.crt", ca)
    write_file(server / "superlink.sh", templates.SUPERLINK.substitute(start), SCRIPT)
    write_file(server / "superexec.sh", templates.SUPEREXEC.substitute(start), SCRIPT)
    texts = {
        server / "heterotune-superlink.service": templates.SERVER_UNIT.substitute(
            unit, name="heterotune-superlink", what="SuperLink", script="superlink.sh", after="", runs=""
        ),
        server / "heterotune-superexec.service": templates.SERVER_UNIT.substitute(
            unit, name="heterotune-superexec", what="SuperExec", script="superexec.sh",
            after=" heterotune-superlink.service", runs=f" {runs}",
        ),
        server / "nginx.conf": templates.NGINX.substitute(
            here=server, listen=address.port, names=names, port=port
        ),
        server / "nginx-restart.conf": templates.NGINX_RESTART,
        operator / "config.toml": templates.FLOWER_CONFIG.substitute(
            home=operator, ca=server / "ca.crt", port=port
        ),
    }  # fmt: skip
    for path, text in texts.items():
        write_file(path, text)


def _write_node(deployment: Deployment, name: str, ca: bytes) -> None:
    place, restart = deployment.node(name), templates.RESTART_SECONDS
    write_file(place / "ca.crt", ca)
    write_file(place / NODE_MANIFEST, json.dumps(_node_manifest(deployment, ca), indent=2) + "\n")
    script = templates.NODE_SCRIPT.substitute(bin=deployment.node_bin, restart=restart)
    write_file(place / "start.sh", script, SCRIPT)
    unit = templates.NODE_UNIT.substitute(
        here=deployment.node_folder, node=name, user=deployment.user, restart=restart
    )
    write_file(place / "heterotune-node.service", unit)
    if not present(place / "node.toml", "the settings"):  # its owner's from then on
        write_file(place / "node.toml", templates.node_toml(deployment.address, name))


def _node_manifest(deployment: Deployment, ca: bytes) -> dict[str, Any]:
    """What a node compares itself with: the server's code, libraries and CA."""
    parsed = certificates.load_certificate(ca, "the CA certificate")
    return {
        "server": str(deployment.address),
        "ca_sha256": certificates.fingerprint(parsed),
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
        Of the server certificate, see :func:`write_folder`.
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
    write_folder(deployment, days, renew)
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
