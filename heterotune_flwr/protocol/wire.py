"""Reading and writing the records of a message, field by field, believing nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError, FederationError
from heterotune_flwr.exchange.codecs import precise
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import Tensors, pack, unpack
from heterotune_flwr.flower import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from heterotune_flwr.jsons import as_float, parse_json
from heterotune_flwr.names import ID_RULE, is_id, safe_text

CONFIG, METRICS = "config", "metrics"
TENSORS, MAPS, FACTORS, DELTAS = "tensors", "maps", "factors", "deltas"

#: Kinds of error a client reports; ``maps_missing`` makes the server send the maps again, ``tensors_missing`` all
#: tensors. ``refused_by_node``: its owner's floors forbid what was asked, which is no failure.
ERROR_KINDS = ("failed", "maps_missing", "tensors_missing", "refused_by_node")
ERROR_FAILED, ERROR_MAPS_MISSING, ERROR_TENSORS_MISSING, ERROR_REFUSED = ERROR_KINDS

#: Letters of an error that travels.
_LONGEST_ERROR = 1000
T = TypeVar("T")


class RemoteError(FederationError):
    """A client answered with an error instead of a result.

    Attributes
    ----------
    kind
        ``failed``, or ``maps_missing`` or ``tensors_missing`` when the client lacks what the request names, or
        ``refused_by_node``.
    client_id
        How the client calls itself, where it says so: before it has described itself nobody else knows.

    """

    def __init__(self, message: str, kind: str = ERROR_FAILED, client_id: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.client_id = client_id


def read_config(content: RecordDict) -> ConfigRecord:
    """Return the ``config`` record; RemoteError if it reports an error."""
    record = content.get(CONFIG)
    if not isinstance(record, ConfigRecord):
        raise ExchangeError("the message has no 'config' record")
    if "error" in record:
        kind, name = record.get("error_kind"), record.get("client_id")
        raise RemoteError(
            safe_text(str(record["error"]), _LONGEST_ERROR),
            kind if kind in ERROR_KINDS else ERROR_FAILED,
            name if isinstance(name, str) and is_id(name) else "",
        )
    return record


def read_field(record: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return ``record[key]``, an instance of ``kind`` (an int may stand for a float)."""
    if key not in record:
        raise ExchangeError(f"the message lacks the field {key!r}")
    value: Any = record[key]
    if kind is float and type(value) is int:
        try:
            value = as_float(value, f"field {key!r} of the message")
        except ValueError as error:
            raise ExchangeError(str(error)) from error
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ExchangeError(
            f"field {key!r} of the message is a {type(value).__name__}, expected {kind.__name__}"
        )
    return value


def read_id(record: Mapping[str, Any], key: str, empty: bool = False) -> str:
    """Return an id (:mod:`..names`); where it may be ``empty``, that too."""
    value = read_field(record, key, str)
    if not is_id(value) and (value or not empty):
        raise ExchangeError(f"field {key!r} of the message is no id: {ID_RULE}")
    return value


def read_texts(record: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of texts."""
    values = read_field(record, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ExchangeError(f"field {key!r} of the message must be a list of texts")
    return cast(list[str], values)


def read_json(record: Mapping[str, Any], key: str) -> Any:
    """Return the JSON value of a text field; half a surrogate pair, which no tokenizer takes, is none."""
    text = read_field(record, key, str)
    try:
        value = parse_json(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"field {key!r} of the message is not JSON: {error}") from error


def read_tensors(content: RecordDict, key: str, expected: Expected | None = None) -> Tensors | None:
    """Return the packed tensors of record ``key``, None when there is no such record."""
    if key not in content:
        return None
    record = content[key]
    if not isinstance(record, ArrayRecord):
        raise ExchangeError(f"record {key!r} of the message holds no arrays")
    return unpack(record, expected)


def read_metrics(content: RecordDict) -> dict[str, float]:
    """Return the ``metrics`` record as plain numbers."""
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise ExchangeError("the message has no 'metrics' record")
    values: dict[str, float] = {}
    for key, value in record.items():
        if not is_id(key):
            raise ExchangeError(f"the name of a metric is no id: {ID_RULE}")
        if isinstance(value, list):
            raise ExchangeError(f"metric {key!r} is a list, expected a number")
        values[key] = float(value)
    return values


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """Boolean mask -> bytes, eight entries a byte."""
    return np.packbits(np.asarray(mask, dtype=bool)).tobytes()


def unpack_mask(data: bytes, length: int) -> NDArray[np.bool_]:
    """Inverse of :func:`pack_mask` for ``length`` entries; ExchangeError if the sizes differ."""
    if len(data) != (length + 7) // 8:
        raise ExchangeError(f"a mask of {length} words came as {len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=length)
    return bits.astype(bool)


def error_content(message: str, kind: str = ERROR_FAILED, client_id: str = "") -> RecordDict:
    """Content of a reply that says in one line why there is no result."""
    line = safe_text(message, _LONGEST_ERROR) or "unknown error"
    record = ConfigRecord({"error": line, "error_kind": kind})
    if client_id:
        record["client_id"] = client_id
    return RecordDict({CONFIG: record})


def add_tensors(
    content: RecordDict,
    tensors: Tensors,
    maps: Tensors | None,
    codec: str,
    exact: str | None = None,
) -> RecordDict:
    """Add the packed ``tensors`` (when any) and ``maps`` (when given) to a request.

    Maps are written with ``exact``; None: with ``codec`` where it is at least as exact as bf16, else with bf16.
    """
    if tensors:
        content[TENSORS] = pack(tensors, codec)
    if maps is not None:
        content[MAPS] = pack(maps, exact or precise(codec))
    return content
