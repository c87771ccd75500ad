"""What a fuzzer feeds: bytes become a record or a message, are read, and whatever is accepted is held to its word.

No fuzzer in here (:mod:`.fuzz_exchange` has one, tests/exchange/test_hostile.py another). A broken promise raises
AssertionError; anything that leaves the reader and is no ExchangeError is a bug by itself.
"""

from __future__ import annotations

import functools
import io
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.arrays import flat_array
from heterotune_flwr.exchange.codecs import find_codec
from heterotune_flwr.exchange.manifest import Expected, Manifest
from heterotune_flwr.exchange.packing import pack, unpack
from heterotune_flwr.flower import Array, ArrayRecord, content_from_bytes, content_to_bytes
from heterotune_flwr.protocol.cached import CachedRef
from heterotune_flwr.protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.queries import AlignReply, DescribeReply
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import MethodConfig

CODECS = ("bf16", "fp16", "fp32", "int8", "nf4", "topk:0.1", "topk:0.5")
#: Codecs for which one tensor has one encoding: what is accepted must come back byte for byte.
CANONICAL = ("int8", "nf4")
SHAPES = {"a.down": (3, 40), "b.bias": (5,), "c.empty": (0, 4), "d.one": (1,), "e.up": (70,)}
READERS: tuple[Callable[..., object], ...] = (
    TrainReply.from_content, EvaluateReply.from_content, TrainRequest.from_content,
    EvaluateRequest.from_content, AlignReply.from_content, DescribeReply.from_content,
)  # fmt: skip
#: Bytes of memory that reading may take: so much for itself, and so much for every byte received or number expected.
_OWN, _EACH = 1 << 20, 1024

counts: Counter[str] = Counter()


@functools.lru_cache(maxsize=1 << 14)
def _header(count: int, dtype: str) -> bytes:
    stream = io.BytesIO()
    kind = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, kind)
    return stream.getvalue()


def _flat(data: bytes, dtype: str = "|u1") -> Array:
    kind = np.dtype(dtype)
    count = len(data) // kind.itemsize
    body = _header(count, dtype) + data[: count * kind.itemsize]
    return Array(str(kind), (count,), "numpy.ndarray", body)


def _raw(data: bytes) -> Array:
    """An array whose header is the fuzzer's."""
    return Array("uint8", (len(data) % 251,), "numpy.ndarray", data)


def _manifest(codec: str, choice: int) -> Manifest:
    """A well-formed manifest; which tensors it lists is the fuzzer's choice."""
    chosen = [item for bit, item in enumerate(sorted(SHAPES.items())) if choice >> bit & 1]
    return Manifest(codec, tuple(chosen))


def _split(data: bytes) -> tuple[bytes, bytes]:
    cut = data[0] * len(data) // 256 if data else 0
    return data[1 : 1 + cut], data[1 + cut :]


def _free_manifest(codec: str, head: int, data: bytes) -> ArrayRecord:
    text, body = _split(data)
    return ArrayRecord({"manifest": _flat(text), "data": _flat(body, find_codec(codec).dtype)})


def _free_headers(codec: str, head: int, data: bytes) -> ArrayRecord:
    text, body = _split(data)
    return ArrayRecord({"manifest": _raw(text), "data": _raw(body)})


def _free_data(codec: str, head: int, data: bytes) -> ArrayRecord:
    """A good manifest and as many bytes as it announces: this reaches the codecs."""
    manifest, reader = _manifest(codec, head), find_codec(codec)
    wanted = reader.length(manifest.sizes) * np.dtype(reader.dtype).itemsize
    body = (data * (wanted // max(len(data), 1) + 1))[:wanted] if data else bytes(wanted)
    return ArrayRecord({"manifest": _flat(manifest.to_bytes()), "data": _flat(body, reader.dtype)})


def _changed(codec: str, head: int, data: bytes) -> ArrayRecord:
    """What ``pack`` writes, with bytes replaced: (position, value) pairs from the fuzzer."""
    arrays = _good(codec, head % 16)
    key = "manifest" if data[:1] < b"\x40" else "data"
    body = bytearray(arrays[key].data)
    for place in range(1, min(len(data) - 2, 24), 3):
        where = int.from_bytes(data[place : place + 2], "little") % len(body)
        body[where] = data[place + 2]
    old = arrays[key]
    return ArrayRecord({**arrays, key: Array(old.dtype, old.shape, old.stype, bytes(body))})


@functools.lru_cache(maxsize=256)
def _good(codec: str, seed: int) -> dict[str, Array]:
    """What ``pack`` writes for tensors of some size."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-30, 30)
    tensors = {n: (rng.normal(size=s) * scale).astype(np.float32) for n, s in SHAPES.items()}
    return dict(pack(tensors, codec).items())


_RECORDS = (_free_manifest, _free_headers, _free_data, _free_data, _changed)


def check_record(record: ArrayRecord, expected: Expected | None) -> None:
    """Read a record; what is accepted must be what the writer would write."""
    try:
        tensors = unpack(record, expected)
    except ExchangeError:
        counts["refused"] += 1
        return
    counts["accepted"] += 1
    manifest = Manifest.from_bytes(_text(record))
    assert [(n, v.shape) for n, v in tensors.items()] == list(manifest.tensors)
    if expected is not None and expected.shapes is not None:
        assert all(value.shape == expected.shapes[name] for name, value in tensors.items())
    again = pack(tensors, manifest.codec)
    assert _text(again) == _text(record)
    if manifest.codec in CANONICAL:
        assert again["data"].data == record["data"].data
    for name, value in unpack(again, expected).items():
        assert np.array_equal(value, tensors[name], equal_nan=True)


def _text(record: ArrayRecord) -> bytes:
    return flat_array(record, "manifest", "|u1").tobytes()


def check_message(data: bytes, reader: Callable[..., object]) -> None:
    """Read a message from its bytes on the wire."""
    try:
        reader(content_from_bytes(data))
    except (ExchangeError, RemoteError):
        counts["refused"] += 1
        return
    counts["accepted"] += 1


def check(data: bytes, measure: bool = False) -> None:
    """One input: its first three bytes choose what the rest becomes.

    ``measure`` bounds the memory that reading takes by the size of the input (slow).
    """
    counts["inputs"] += 1
    kind, head, choice, rest = (*data[:3], *b"\0\0\0"[len(data) :], data[3:])
    if measure:
        tracemalloc.start()
    try:
        if kind % 8 >= len(_RECORDS):
            check_message(rest, READERS[head % len(READERS)])
        else:
            codec = CODECS[choice % len(CODECS)]
            expected = Expected(SHAPES, CODECS) if choice & 0x80 else None
            check_record(_RECORDS[kind % 8](codec, head, rest), expected)
        if measure:
            peak = tracemalloc.get_traced_memory()[1]
            numbers = sum(int(np.prod(shape)) for shape in SHAPES.values())
            assert peak <= _OWN + _EACH * (len(data) + numbers), f"{peak} bytes for {len(data)}"
            counts["measured"] += 1
    finally:
        if measure:
            tracemalloc.stop()


def seeds() -> list[bytes]:
    """Inputs to begin with: every kind of record and codec, and good messages."""
    inputs = []
    for codec in range(len(CODECS)):
        for flag in (0, 0x80 // len(CODECS) * len(CODECS) + len(CODECS)):
            choice = (flag + codec) % 256
            text = _manifest(CODECS[codec], 31).to_bytes()
            inputs += [bytes([kind, 31, choice, *range(40)]) for kind in range(len(_RECORDS))]
            inputs.append(bytes([0, 31, choice, 255]) + text)
    tensors = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    header = Header("run", 0, MethodConfig(output=4), 3)
    channels = {"some.channel": Payload(tensors, {"count": 3}, "bf16")}
    messages = [
        TrainReply("c", "t", 3, "d", tensors, {"loss": 1.0}, cache_digest="k", channels=channels).to_content("int8"),
        EvaluateReply("c", "t", 3, "d", {"global_loss": 1.0}).to_content(),
        TrainRequest(header, tensors, "d", tensors, ["a.down"], channels=channels,
                     cached=CachedRef(["x"], "d")).to_content("nf4"),
        EvaluateRequest(header, tensors, "d", None, ["global"]).to_content("bf16"),
        AlignReply("c", "t", tensors).to_content("bf16"),
        DescribeReply("c", "t", "f", "nf4", 9, 3, 9, 9, 9, 9, 3, ["x"], SHAPES, "0", "1", 1).to_content(),
    ]  # fmt: skip
    inputs += [bytes([7, i, 0]) + content_to_bytes(message) for i, message in enumerate(messages)]
    return inputs
