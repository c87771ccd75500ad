"""Named tensors <-> one flat array plus a manifest in a Flower ``ArrayRecord``.

A deployed Flower run pays about 30 ms for every array of a record, whatever its size, and an
``ArrayRecord`` knows no bfloat16. So a tree of tensors travels as two arrays (docs/exchange.md has them byte by byte):

``data``
    all tensors one after the other in the order of the manifest, as the codec writes them;
``manifest``
    what they are (:mod:`.manifest`).

Whatever arrives is checked before it is believed, and before anything of the size it announces is allocated; a
malformed record raises :class:`ExchangeError`. Numbers that are not finite pass: they are the business of
the update gate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.arrays import flat_array
from heterotune_flwr.exchange.codecs import Codec, RecordCodec, Sizes, find_codec
from heterotune_flwr.exchange.manifest import Expected, Manifest
from heterotune_flwr.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_DATA, _MANIFEST = "data", "manifest"

Tensors = dict[str, NDArray[np.float32]]


def _encode(values: NDArray[np.float32], sizes: Sizes, codec: Codec | RecordCodec) -> NDArray[Any]:
    """Write flat numbers; a codec that does not keep its word is told here, not by the receiver."""
    encoded = np.ascontiguousarray(codec.write(values, sizes))
    if encoded.dtype != np.dtype(codec.dtype) or encoded.shape != (codec.length(sizes),):
        raise ExchangeError(
            f"the codec made {encoded.dtype}{list(encoded.shape)} of {values.size} numbers, not {codec.dtype}"
        )
    return encoded


def _decode(data: NDArray[Any], sizes: Sizes, codec: Codec | RecordCodec) -> NDArray[np.float32]:
    try:
        decoded = np.asarray(codec.read(data, sizes), dtype=np.float32)
    except Exception as error:  # an installed codec, and numbers from the network
        raise ExchangeError(f"the codec cannot read what was sent: {error}") from error
    if decoded.shape != (sum(sizes),):
        raise ExchangeError(f"the codec made {decoded.size} numbers of {sum(sizes)}")
    return decoded


def _flattened(tensors: Mapping[str, NDArray[Any]]) -> tuple[Manifest, NDArray[np.float32]]:
    """The tensors' numbers one after the other in order of names, and the manifest but for its codec."""
    arrays = {name: np.asarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}
    flat = [a.reshape(-1) for a in arrays.values()]
    empty = np.zeros(0, dtype=np.float32)
    manifest = Manifest("", tuple((name, a.shape) for name, a in arrays.items()))
    return manifest, np.concatenate(flat) if flat else empty


def _divided(manifest: Manifest, values: NDArray[np.float32]) -> Tensors:
    tensors: Tensors = {}
    start = 0
    for (name, shape), size in zip(manifest.tensors, manifest.sizes, strict=True):
        tensors[name] = values[start : start + size].reshape(shape).copy()
        start += size
    return tensors


def pack(tensors: Mapping[str, NDArray[Any]], codec: str) -> ArrayRecord:
    """Pack named tensors into one flat array and a manifest.

    Arrays may be of any shape; they are converted to float32 first. ``codec`` is a shipped one or an installed
    package's (:mod:`.codecs`).

    Raises ExchangeError: the codec is unknown.
    """
    writer = find_codec(codec)
    layout, flat = _flattened(tensors)
    text = Manifest(codec, layout.tensors).to_bytes()
    return ArrayRecord(
        {
            _DATA: Array(_encode(flat, layout.sizes, writer)),
            _MANIFEST: Array(np.frombuffer(text, dtype=np.uint8).copy()),
        }
    )


def unpack(record: ArrayRecord, expected: Expected | None = None) -> Tensors:
    """Read what :func:`pack` wrote, as float32 arrays (copies, writable).

    ``expected``: names, shapes and codecs it may have; None: any, as long as it announces at most 16 numbers per byte.

    Raises ExchangeError: anything about the record is malformed or not expected: arrays missing or of another dtype,
    manifest not in its one form, unknown codec, impossible shapes, sizes that do not add up, bytes the codec would not
    write.
    """
    if set(record) != {_DATA, _MANIFEST}:
        raise ExchangeError("packed tensors are the arrays 'data' and 'manifest' and no others")
    manifest = Manifest.from_bytes(flat_array(record, _MANIFEST, "|u1").tobytes())
    manifest.check(expected or Expected(), len(record[_DATA].data))
    reader, sizes = find_codec(manifest.codec), manifest.sizes
    data = flat_array(record, _DATA, reader.dtype)
    if data.size != reader.length(sizes):
        raise ExchangeError(
            f"the manifest announces {sum(sizes)} numbers, {reader.length(sizes)} x {reader.dtype}, "
            f"but {data.size} were sent"
        )
    return _divided(manifest, _decode(data, sizes, reader))


def round_trip(tensors: Mapping[str, NDArray[Any]], codec: str) -> Tensors:
    """Return the tensors as the receiver will see them after ``codec``."""
    coder = find_codec(codec)
    layout, flat = _flattened(tensors)
    seen = _divided(layout, _decode(_encode(flat, layout.sizes, coder), layout.sizes, coder))
    return {name: seen[name] for name in tensors}


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
