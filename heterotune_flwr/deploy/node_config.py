"""A node's ``node.toml``: read, checked, and turned into what ``flower-supernode`` is started with."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.client.floors import Floors, checked_floors
from heterotune_flwr.client.identify import required_of
from heterotune_flwr.client.node_keys import SERVER
from heterotune_flwr.deploy.certificates import load_certificate
from heterotune_flwr.deploy.files import (
    make_folder,
    open_to_others,
    present,
    read_bytes,
    remove,
    unfinished,
    write_private,
)
from heterotune_flwr.deploy.keys import how_to_make, public_of
from heterotune_flwr.deploy.node_values import check_keys, check_values
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import close_to_others
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.programs import QUIET, program, search_path, to_toml

#: Settings of the client that ``node start`` turns into environment variables of the process.
_ENVIRONMENT = ("device", "cache")
_COPY_CA = "copy the server's ca.crt there"
_PATHS = ("data", "test", "anchors", "state-dir", "cache")
#: How large the pieces are that a node sends an array in. Flower gives a request 30 s to be sent and then starts it
#: anew: its own 5 MiB never arrive over 1 Mbit/s.
PIECE_VARIABLE, PIECE_BYTES = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 256 * 1024


@dataclass(frozen=True)
class NodeSettings:
    """A checked ``node.toml``, its paths absolute."""

    path: Path
    address: str
    ca: Path
    key: Path
    port: int
    accept_code: str
    client: Mapping[str, Any]
    floors: Floors

    @property
    def host(self) -> str:
        """Host of the server, without port and brackets."""
        return self.address.rsplit(":", 1)[0].strip("[]")

    @property
    def server_port(self) -> int:
        """TCP port of the server."""
        return int(self.address.rsplit(":", 1)[1])

    @property
    def state_dir(self) -> Path:
        """The client's private files."""
        return Path(str(self.client["state-dir"]))

    @property
    def device(self) -> str | None:
        """``cpu``, ``cuda`` or ``cuda:N``; None: the GPU if there is one."""
        return self.client.get("device")

    def node_config(self) -> dict[str, Any]:
        """What the SuperNode is told about its client."""
        config = {key: value for key, value in self.client.items() if key not in _ENVIRONMENT}
        if self.accept_code == "installed":
            config["code-hash"] = code_hash()
        return config | self.floors.to_config()

    def environment(self) -> dict[str, str]:
        """Environment of the SuperNode and of everything it starts."""
        environment = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self.state_dir / "flwr"),
            "TOKENIZERS_PARALLELISM": "false",
            PIECE_VARIABLE: os.environ.get(PIECE_VARIABLE, str(PIECE_BYTES)),
            # Below the SuperNode, flwr and Python are looked for by name.
            "PATH": search_path(),
        }
        if "threads" in self.client:
            environment["OMP_NUM_THREADS"] = str(self.client["threads"])
        if "cache" in self.client:
            environment["HETEROTUNE_CACHE"] = str(self.client["cache"])
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif self.device and ":" in self.device:
            environment["CUDA_VISIBLE_DEVICES"] = self.device.split(":", 1)[1]
        return environment


def read_node_settings(path: Path) -> NodeSettings:
    """Read and check a node's file.

    Raises ConfigError: no such file, no TOML, an unknown key (the nearest known one is named), a value of the wrong
    kind, or a required one is missing.
    """
    path = path.expanduser().absolute()
    if os.path.isdir(path):  # unlike Path.is_dir, no error where a folder is closed
        path /= "node.toml"
    raw = read_bytes(path, "the node's settings", "give the path of node.toml")
    try:
        tables = tomllib.loads(raw.decode("utf-8-sig"))  # editors on Windows begin it with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8 ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    check_keys(path, tables)
    server, client = dict(tables.get("server", {})), dict(tables.get("client", {}))
    guest = tables.get("client", {}).get("guest", "no") != "no"  # another value is refused below
    needed = required_of(guest)
    for table, key in [("server", "address"), *(("client", key) for key in needed)]:
        if not tables.get(table, {}).get(key):
            raise ConfigError(f"{path}: [{table}] lacks {key}")
    check_values(path, server, client)
    folder = path.parent
    for key in _PATHS:
        if key in client and not (key == "anchors" and client[key] in SHIPPED):
            client[key] = str(_absolute(folder, client[key]))
    return NodeSettings(
        path=path,
        address=str(server["address"]),
        ca=_absolute(folder, server.get("ca", SERVER["ca"].default)),
        key=_absolute(folder, server.get("key", SERVER["key"].default)),
        port=int(server.get("port", SERVER["port"].default)),
        accept_code=str(server.get("accept-code", SERVER["accept-code"].default)),
        client=client,
        floors=Floors(**checked_floors(tables.get("floors", {}), f"{path}: [floors]")),
    )


def _absolute(folder: Path, given: str) -> Path:
    return Path(os.path.normpath(folder / Path(given).expanduser()))


def key_trouble(settings: NodeSettings) -> str | None:
    """Why the private key is not fit for use, None when it is (ConfigError where it cannot be seen)."""
    key, name = settings.key, str(settings.client["client-id"])
    if not present(key, "the private key"):
        return f"the private key {key} is missing; {how_to_make(key.parent, name)}"
    public_of(key, name)
    if open_to_others(key):
        return f"the private key {key} is open to others; run: chmod 600 {key}"
    return None


def check_ca(settings: NodeSettings) -> bytes:
    """The CA certificate by which the server is recognised (ConfigError when there is none)."""
    if not present(settings.ca, "the CA certificate"):
        raise ConfigError(f"the CA certificate {settings.ca} is missing; {_COPY_CA}")
    pem = read_bytes(settings.ca, "the CA certificate", _COPY_CA)
    try:
        load_certificate(pem, str(settings.ca))
    except ConfigError as error:
        raise ConfigError(f"{settings.ca} is no CA certificate; {_COPY_CA}") from error
    return pem


def supernode_command(settings: NodeSettings) -> list[str]:
    """Write the node configuration for Flower and return the command that becomes the SuperNode.

    Raises ConfigError: the key is missing, no key, or open to others, there is no CA certificate, or the state folder
    cannot be made and written.
    """
    trouble = key_trouble(settings)
    if trouble is not None:
        raise ConfigError(trouble)
    check_ca(settings)
    make_folder(settings.state_dir)
    close_to_others(settings.state_dir)
    # A file, not an argument: arguments are seen by everybody on the machine and cannot quote every path.
    written = settings.state_dir / "node-config.toml"
    for old in (written, *unfinished(settings.state_dir)):
        remove(old)
    write_private(written, to_toml(settings.node_config()).encode())
    return [
        program("flower-supernode"),
        "--root-certificates", str(settings.ca),
        "--superlink", settings.address,
        "--host", "127.0.0.1", "--port", str(settings.port),
        "--auth-supernode-private-key", str(settings.key),
        "--node-config", str(written),
    ]  # fmt: skip
