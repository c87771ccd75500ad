"""What ``node.toml`` may say: its keys, their kinds and values, as the client and Flower will take them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.client.floors import KEYS as FLOORS
from heterotune_flwr.client.node_keys import CLIENT, SERVER, ClientTable, ServerTable, keys_of
from heterotune_flwr.deploy.hosts import check_port, parse_server
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import check_field, kinds
from heterotune_flwr.names import ID_RULE, is_id
from heterotune_flwr.tuning.slots import lowest_slot

#: Keys of the file: table -> key -> what it is.
KEYS = {"server": SERVER, "client": CLIENT, "floors": FLOORS}
_KINDS: dict[object, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
_CUDA = re.compile(r"cuda:[0-9]{1,3}")


def check_keys(path: Path, tables: Mapping[str, Any]) -> None:
    """Refuse tables and keys that there are not, naming the nearest, and values of another kind (ConfigError)."""
    for table, entries in tables.items():
        if table not in KEYS or not isinstance(entries, dict):
            raise ConfigError(
                f"{path}: {table!r} is not known; there are the tables [server], [client] and [floors]"
            )
        for key, value in entries.items():
            if key not in KEYS[table]:
                near = difflib.get_close_matches(key, KEYS[table], n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KEYS[table])}"
                raise ConfigError(f"{path}: [{table}] has no key {key!r}; {hint}")
            kinds = _KINDS[KEYS[table][key].type]
            if not isinstance(value, kinds) or isinstance(value, bool):
                kind = "a text in quotation marks" if kinds == (str,) else "a number"
                raise ConfigError(f"{path}: [{table}] {key} is {value!r}; it must be {kind}")


def check_values(path: Path, server: Mapping[str, Any], client: Mapping[str, Any]) -> None:
    """Refuse values that the client or Flower would refuse, or misread, when the node runs (ConfigError)."""
    _check_server(path, server)
    for table, given in ((ServerTable, server), (ClientTable, client)):
        fields, kinds_of = keys_of(table), kinds(table)
        for key, value in given.items():
            check_field(fields[key], kinds_of[fields[key].name], value, f"{path}: {key}")
    device = client.get("device")
    if device not in (None, "cpu", "cuda") and not _CUDA.fullmatch(device):
        raise ConfigError(f"{path}: device is {device!r}; write cpu, cuda or cuda:0")
    if not is_id(client["client-id"]):
        raise ConfigError(
            f"{path}: client-id is {client['client-id'][:80]!r}; it names files: {ID_RULE}"
        )
    if client.get("slots"):
        try:
            lowest_slot(client["slots"], 1)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _check_server(path: Path, server: Mapping[str, Any]) -> None:
    address = str(server["address"])
    how = f"{path}: [server] address is {address!r}; write it as host:port"
    try:
        _, port = parse_server(address)
    except ConfigError as error:
        raise ConfigError(f"{how} ({error})") from error
    if port is None:
        raise ConfigError(how)
    if "port" in server:
        check_port(server["port"], f"{path}: [server] port is {server['port']}")
