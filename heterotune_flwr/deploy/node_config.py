"""A node's ``node.toml``: read, checked, and turned into what ``flower-supernode`` is started with."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.backbones.sources import AUTO, BITS
from heterotune_flwr.deploy.files import make_folder, open_to_others, write_private
from heterotune_flwr.deploy.templates import NODE_RUNTIME_PORT
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.identity import REPORTS, REQUIRED, code_hash
from heterotune_flwr.federation.superlink import toml_string

#: Keys of the file: table -> key -> type of its value.
_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "server": {"address": (str,), "ca": (str,), "key": (str,), "port": (int,), "accept-code": (str,)},
    "client": {
        **dict.fromkeys(
            ("client-id", "backbone", "bits", "revision", "data", "format", "test", "anchors", "state-dir", "cache",
             "text-field", "label-field", "slots", "report", "device", "worker"),
            (str,),
        ),
        "memory-gb": (int, float),
        "threads": (int,),
        "worker-idle-minutes": (int, float),
    },
}  # fmt: skip
#: Settings of the client that ``node start`` turns into environment variables of the process.
_ENVIRONMENT = ("device", "cache")
_PATHS = ("data", "test", "anchors", "state-dir", "cache")
FORMATS = ("jsonl", "csv", "parquet", "dataset")
ACCEPT = ("installed", "any")
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
        return config

    def environment(self) -> dict[str, str]:
        """Environment of the SuperNode and of everything it starts."""
        environment = {
            **os.environ,
            "FLWR_HOME": str(self.state_dir / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "TOKENIZERS_PARALLELISM": "false",
            PIECE_VARIABLE: os.environ.get(PIECE_VARIABLE, str(PIECE_BYTES)),
            # Below the SuperNode, flwr and Python are looked for by name.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
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

    Raises
    ------
    ConfigError
        No such file, no TOML, an unknown key (the nearest known one is named), a value of the wrong kind, or a
        required one is missing.

    """
    path = path.expanduser().absolute()
    if path.is_dir():
        path /= "node.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the node's settings {path} cannot be read ({error.strerror or error}); give the path of node.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _check_keys(path, tables)
    server, client = dict(tables.get("server", {})), dict(tables.get("client", {}))
    for table, key in [("server", "address"), *(("client", key) for key in REQUIRED)]:
        if not tables.get(table, {}).get(key):
            raise ConfigError(f"{path}: [{table}] lacks {key}")
    _check_values(path, server, client)
    folder = path.parent
    for key in _PATHS:
        if key in client and not (key == "anchors" and "/" not in client[key]):
            client[key] = str(_absolute(folder, client[key]))
    return NodeSettings(
        path=path,
        address=str(server["address"]),
        ca=_absolute(folder, server.get("ca", "ca.crt")),
        key=_absolute(folder, server.get("key", "node.key")),
        port=int(server.get("port", NODE_RUNTIME_PORT)),
        accept_code=str(server.get("accept-code", ACCEPT[0])),
        client=client,
    )


def _absolute(folder: Path, given: str) -> Path:
    return Path(os.path.normpath(folder / Path(given).expanduser()))


def _check_keys(path: Path, tables: Mapping[str, Any]) -> None:
    for table, entries in tables.items():
        if table not in _KEYS or not isinstance(entries, dict):
            raise ConfigError(
                f"{path}: {table!r} is not known; there are the tables [server] and [client]"
            )
        for key, value in entries.items():
            if key not in _KEYS[table]:
                near = difflib.get_close_matches(key, _KEYS[table], n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KEYS[table])}"
                raise ConfigError(f"{path}: [{table}] has no key {key!r}; {hint}")
            kinds = _KEYS[table][key]
            if not isinstance(value, kinds) or isinstance(value, bool):
                kind = "a text in quotation marks" if kinds == (str,) else "a number"
                raise ConfigError(f"{path}: [{table}] {key} is {value!r}; it must be {kind}")


def _check_values(path: Path, server: Mapping[str, Any], client: Mapping[str, Any]) -> None:
    host, _, port = str(server["address"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{path}: [server] address is {server['address']!r}; write it as host:port"
        )
    choices = (
        ("bits", client.get("bits"), (*BITS, AUTO)),
        ("format", client.get("format"), FORMATS),
        ("report", client.get("report"), REPORTS),
        ("accept-code", server.get("accept-code"), ACCEPT),
    )
    for key, value, known in choices:
        if value is not None and value not in known:
            raise ConfigError(f"{path}: {key} is {value!r}; choose one of {', '.join(known)}")
    for key in ("memory-gb", "threads", "worker-idle-minutes"):
        if key in client and not 0 < client[key] < float("inf"):
            raise ConfigError(f"{path}: {key} is {client[key]}; it must be above 0")
    device = client.get("device")
    if device is not None and device not in ("cpu", "cuda"):
        kind, _, number = device.partition(":")
        if kind != "cuda" or not number.isdigit():
            raise ConfigError(f"{path}: device is {device!r}; write cpu, cuda or cuda:0")


def key_trouble(settings: NodeSettings) -> str | None:
    """Why the private key is not fit for use, None when it is."""
    if not settings.key.is_file():
        return (
            f"the private key {settings.key} is missing; make one with: heterotune node key "
            f"{settings.key.parent}, and give node.pub to the operator"
        )
    if open_to_others(settings.key):
        return f"the private key {settings.key} is open to others; run: chmod 600 {settings.key}"
    return None


def supernode_command(settings: NodeSettings) -> list[str]:
    """Write the node configuration for Flower and return the command that becomes the SuperNode.

    Raises
    ------
    ConfigError
        The key is missing or open to others, there is no CA certificate, or the state folder cannot be made.

    """
    trouble = key_trouble(settings)
    if trouble is not None:
        raise ConfigError(trouble)
    if not settings.ca.is_file():
        raise ConfigError(
            f"the CA certificate {settings.ca} is missing; copy the server's ca.crt there"
        )
    make_folder(settings.state_dir)
    # A file, not an argument: arguments are seen by everybody on the machine and cannot quote every path.
    written = settings.state_dir / "node-config.toml"
    written.unlink(missing_ok=True)
    lines = [f"{key} = {_toml(value)}\n" for key, value in settings.node_config().items()]
    write_private(written, "".join(lines).encode())
    return [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--root-certificates", str(settings.ca),
        "--superlink", settings.address,
        "--host", "127.0.0.1", "--port", str(settings.port),
        "--auth-supernode-private-key", str(settings.key),
        "--node-config", str(written),
    ]  # fmt: skip


def _toml(value: str | int | float) -> str:
    return toml_string(value) if isinstance(value, str) else repr(value)
