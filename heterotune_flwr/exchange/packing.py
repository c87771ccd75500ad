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
from heterotune_flwr.exchange.codecs import Codec, find_codec
from heterotune_flwr.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_DATA, _MANIFEST = "data", "manifest"
#: A record claiming more numbers than this is refused (4 GiB in float32).
_MAX_ELEMENTS = 1 << 30

Tensors = dict[str, NDArray[np.float32]]


def _encode(values: NDArray[np.float32], codec: Codec) -> NDArray[Any]:
    """Write flat numbers; a codec that does not keep its word is told here, not by the receiver."""
    encoded = np.ascontiguousarray(codec.encode(values))
    if encoded.dtype != np.dtype(codec.dtype) or encoded.shape != values.shape:
        raise ExchangeError(
            f"the codec made {encoded.dtype}{list(encoded.shape)} of {values.size} numbers, not {codec.dtype}"
        )
    return encoded


def _decode(values: NDArray[Any], codec: Codec) -> NDArray[np.float32]:
    try:
        decoded = np.asarray(codec.decode(values), dtype=np.float32)
    except Exception as error:  # an installed codec, and numbers from the network
        raise ExchangeError(f"the codec cannot read what was sent: {error}") from error
    if decoded.shape != values.shape:
        raise ExchangeError(f"the codec made {decoded.size} numbers of {values.size}")
    return decoded


def pack(tensors: Mapping[str, NDArray[Any]], codec: str) -> ArrayRecord:
    """Pack named tensors into one flat array and a manifest.

    Parameters
    ----------
    tensors
        Name -> array of any shape; converted to float32 first. May be empty.
    codec
        ``bf16`` | ``fp16`` | ``fp32``, or an installed package's (:mod:`.codecs`).

    Raises
    ------
    ExchangeError
        The codec is unknown.

    """
    writer = find_codec(codec)
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
            _DATA: Array(_encode(flat, writer)),
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
    find_codec(codec)
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
    reader = find_codec(codec)
    flat = _array(record, _DATA, reader.dtype)
    sizes = [math.prod(shape) for _, shape in shapes]
    if sum(sizes) > _MAX_ELEMENTS or sum(sizes) != flat.size:
        raise ExchangeError(
            f"the manifest announces {sum(sizes)} numbers but {flat.size} were sent"
        )
    decoded = _decode(flat, reader)
    tensors: Tensors = {}
    start = 0
    for (name, shape), size in zip(shapes, sizes, strict=True):
        tensors[name] = decoded[start : start + size].reshape(shape).copy()
        start += size
    return tensors


def round_trip(tensors: Mapping[str, NDArray[Any]], codec: str) -> Tensors:
    """Return the tensors as the receiver will see them after ``codec``."""
    coder = find_codec(codec)
    result: Tensors = {}
    for name, value in tensors.items():
        flat = np.asarray(value, dtype=np.float32).reshape(-1)
        result[name] = _decode(_encode(flat, coder), coder).reshape(np.shape(value))
    return result


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
