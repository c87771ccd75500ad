"""What ``node.toml`` may say: its keys, their kinds and values, as the client and Flower will take them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.client.floors import KEYS as FLOORS
from heterotune_flwr.client.identify import ANSWERS, CLASS_SUMS, GUEST, REPORTS
from heterotune_flwr.data.tables import FORMS
from heterotune_flwr.deploy.hosts import check_port, parse_server
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.names import ID_RULE, is_id
from heterotune_flwr.schema import AUTO, BITS
from heterotune_flwr.tuning.slots import lowest_slot

#: Keys of the file: table -> key -> type of its value.
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "server": {"address": (str,), "ca": (str,), "key": (str,), "port": (int,), "accept-code": (str,)},
    "client": {
        **dict.fromkeys(
            ("client-id", "backbone", "bits", "revision", "data", "format", "test", "anchors", "state-dir", "cache",
             "text-field", "label-field", "references-field", "slots", "report", "answers", "class-sums", "guest",
             "device", "worker"),
            (str,),
        ),
        "memory-gb": (int, float),
        "threads": (int,),
        "worker-idle-minutes": (int, float),
    },
    "floors": dict.fromkeys(FLOORS, (int, float)),
}  # fmt: skip
ACCEPT = ("installed", "any")
WORKER = ("on", "off")
#: What no machine has more of; numbers beyond it are slips.
MOST_THREADS = 1024
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
            kinds = KEYS[table][key]
            if not isinstance(value, kinds) or isinstance(value, bool):
                kind = "a text in quotation marks" if kinds == (str,) else "a number"
                raise ConfigError(f"{path}: [{table}] {key} is {value!r}; it must be {kind}")


def check_values(path: Path, server: Mapping[str, Any], client: Mapping[str, Any]) -> None:
    """Refuse values that the client or Flower would refuse, or misread, when the node runs (ConfigError)."""
    _check_server(path, server)
    choices = (
        ("bits", client.get("bits"), (*BITS, AUTO)),
        ("format", client.get("format"), FORMS),
        ("report", client.get("report"), REPORTS),
        ("answers", client.get("answers"), ANSWERS),
        ("class-sums", client.get("class-sums"), CLASS_SUMS),
        ("guest", client.get("guest"), GUEST),
        ("worker", client.get("worker"), WORKER),
        ("accept-code", server.get("accept-code"), ACCEPT),
    )
    for key, value, known in choices:
        if value is not None and value not in known:
            raise ConfigError(f"{path}: {key} is {value!r}; choose one of {', '.join(known)}")
    for key in ("memory-gb", "threads", "worker-idle-minutes"):
        if key in client and not 0 < client[key] < float("inf"):
            raise ConfigError(f"{path}: {key} is {client[key]}; it must be above 0")
    if client.get("threads", 1) > MOST_THREADS:
        raise ConfigError(f"{path}: threads is {client['threads']}; at most {MOST_THREADS}")
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
