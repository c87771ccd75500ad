"""Named tensors <-> one flat array plus a manifest in a Flower ``ArrayRecord``.

A deployed Flower run pays about 30 ms for every array of a record, whatever its size, and an
``ArrayRecord`` knows no bfloat16. So a tree of tensors travels as two arrays:

``data``
    all tensors one after the other in the order of the manifest, little endian, each number as the
    codec writes it (``bf16`` as the upper 16 bits of a float32, rounded to nearest even);
``manifest``
    UTF-8 JSON ``{"codec": "bf16", "tensors": [["name", [2, 3]], ...]}``, names in sorted order.

Whatever arrives is checked before it is believed; a malformed record raises :class:`ExchangeError`.
Numbers that are not finite pass: they are the business of the update gate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

#: codec -> dtype of its numbers on the wire
CODECS: dict[str, str] = {"bf16": "<u2", "fp16": "<f2", "fp32": "<f4"}

_DATA, _MANIFEST = "data", "manifest"
#: A record claiming more numbers than this is refused (4 GiB in float32).
_MAX_ELEMENTS = 1 << 30

Tensors = dict[str, NDArray[np.float32]]


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16 (nearest, ties to even); NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype("<u2")
    # Adding the rounding term may carry a NaN's mantissa over into infinity or zero.
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper).astype("<u2")


def _from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode(values: NDArray[np.float32], codec: str) -> NDArray[Any]:
    if codec == "bf16":
        return _to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype(CODECS[codec])


def _decode(values: NDArray[Any], codec: str) -> NDArray[np.float32]:
    if codec == "bf16":
        return _from_bf16(values)
    return values.astype(np.float32)


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise ExchangeError(f"exchange.codec is {codec!r}; choose one of {', '.join(CODECS)}")


def pack(tensors: Mapping[str, NDArray[Any]], codec: str) -> ArrayRecord:
    """Pack named tensors into one flat array and a manifest.

    Parameters
    ----------
    tensors
        Name -> array of any shape; converted to float32 first. May be empty.
    codec
        ``bf16`` | ``fp16`` | ``fp32``.

    Raises
    ------
    ExchangeError
        The codec is unknown.

    """
    _check_codec(codec)
    names = sorted(tensors)
    arrays = [np.asarray(tensors[name], dtype=np.float32) for name in names]
    manifest = {
        "codec": codec,
        "tensors": [[name, list(a.shape)] for name, a in zip(names, arrays, strict=True)],
    }
    empty = np.zeros(0, dtype=np.float32)
    flat = np.concatenate([a.reshape(-1) for a in arrays]) if arrays else empty
    text = json.dumps(manifest, separators=(",", ":")).encode()
    return ArrayRecord(
        {
            _DATA: Array(np.ascontiguousarray(_encode(flat, codec))),
            _MANIFEST: Array(np.frombuffer(text, dtype=np.uint8).copy()),
        }
    )


def _array(record: ArrayRecord, key: str, dtype: str) -> NDArray[Any]:
    if key not in record:
        raise ExchangeError(f"packed tensors lack the array {key!r} (found {sorted(record)})")
    try:
        values = record[key].numpy()
    except Exception as error:  # whatever a hostile byte string makes numpy raise
        raise ExchangeError(f"packed array {key!r} cannot be read: {error}") from error
    if values.ndim != 1 or values.dtype != np.dtype(dtype):
        raise ExchangeError(
            f"packed array {key!r} is {values.dtype}{list(values.shape)}, expected flat {dtype}"
        )
    return values


def _manifest(record: ArrayRecord) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    """Read and check the manifest; return the codec and the (name, shape) list."""
    raw = _array(record, _MANIFEST, "u1").tobytes()
    try:
        content = json.loads(raw.decode())
        codec, entries = content["codec"], content["tensors"]
        shapes = [(name, tuple(shape)) for name, shape in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExchangeError(f"the manifest of packed tensors is malformed: {error}") from error
    if not isinstance(codec, str):
        raise ExchangeError("the manifest of packed tensors names no codec")
    _check_codec(codec)
    for name, shape in shapes:
        if not isinstance(name, str) or not name:
            raise ExchangeError(f"the manifest names a tensor {name!r}; a non-empty text is needed")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ExchangeError(f"tensor {name!r} has the impossible shape {list(shape)}")
    if len({name for name, _ in shapes}) != len(shapes):
        raise ExchangeError("the manifest of packed tensors names a tensor twice")
    return codec, shapes


def unpack(record: ArrayRecord) -> Tensors:
    """Read what :func:`pack` wrote, as float32 arrays (copies, writable).

    Raises
    ------
    ExchangeError
        Anything about the record is malformed: arrays missing or of another dtype, manifest not
        JSON, unknown codec, duplicate names, impossible shapes, sizes that do not add up.

    """
    codec, shapes = _manifest(record)
    flat = _array(record, _DATA, CODECS[codec])
    sizes = [math.prod(shape) for _, shape in shapes]
    if sum(sizes) > _MAX_ELEMENTS or sum(sizes) != flat.size:
        raise ExchangeError(
            f"the manifest announces {sum(sizes)} numbers but {flat.size} were sent"
        )
    decoded = _decode(flat, codec)
    tensors: Tensors = {}
    start = 0
    for (name, shape), size in zip(shapes, sizes, strict=True):
        tensors[name] = decoded[start : start + size].reshape(shape).copy()
        start += size
    return tensors


def round_trip(tensors: Mapping[str, NDArray[Any]], codec: str) -> Tensors:
    """Return the tensors as the receiver will see them after ``codec``."""
    _check_codec(codec)
    return {
        name: _decode(_encode(np.asarray(value, dtype=np.float32), codec), codec).reshape(
            np.shape(value)
        )
        for name, value in tensors.items()
    }


def tensor_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, shapes and float32 bytes in name order (hex): the maps' identity."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(json.dumps([name, list(value.shape)]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of all arrays of a record, manifest included."""
    return sum(len(array.data) for array in record.values())


def _value_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    if isinstance(value, str):
        return len(value.encode())
    return len(value) if isinstance(value, bytes) else 8


def content_bytes(content: RecordDict) -> int:
    """Bytes of a message's content: arrays, configuration and metrics with their keys.

    Flower's own envelope (ids, signatures, chunk headers) is not counted: it depends on the
    transport, not on the method.
    """
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += payload_bytes(record)
        elif isinstance(record, ConfigRecord | MetricRecord):
            total += sum(len(key.encode()) + _value_bytes(value) for key, value in record.items())
    return total
