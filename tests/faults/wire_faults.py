"""Hostile clients: what their replies hold when they leave the client. Nothing here calls the server's checks.

A fault takes an honest reply's content and gives the hostile one. Values are changed before packing; sizes, dtypes and
bytes are changed in the packed records themselves, whatever their layout: the largest array is taken for the numbers,
the one that reads as JSON for the manifest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from heterotune_flwr.flower import Array, ArrayRecord, Message, RecordDict
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.protocol.wire import DELTAS, error_content

CODEC = "bf16"
Deltas = dict[str, np.ndarray]


def each_value(change: Callable[[np.ndarray], np.ndarray]):
    """Change every number that is sent; what channels are told where no tensor is."""

    def fault(content: RecordDict, memory: dict) -> RecordDict:
        reply = TrainReply.from_content(content)
        if reply.deltas:
            deltas = {name: change(value) for name, value in reply.deltas.items()}
            return replace(reply, deltas=deltas).to_content(CODEC)
        told = {  # in a codec that can say it
            name: replace(one, tensors={n: change(v) for n, v in one.tensors.items()}, codec="fp32")
            for name, one in reply.channels.items()
        }
        return replace(reply, channels=told).to_content(CODEC)

    return fault


def _tensors(change: Callable[[Deltas], Deltas]):
    def fault(content: RecordDict, memory: dict) -> RecordDict:
        reply = TrainReply.from_content(content)
        return replace(reply, deltas=change(dict(reply.deltas))).to_content(CODEC)

    return fault


def _fields(**changes):
    def fault(content: RecordDict, memory: dict) -> RecordDict:
        reply = TrainReply.from_content(content)
        return replace(reply, **{k: v(reply) for k, v in changes.items()}).to_content(CODEC)

    return fault


def _record(content: RecordDict) -> tuple[str, ArrayRecord]:
    arrays = {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}
    key = DELTAS if DELTAS in arrays else next(iter(arrays))
    return key, arrays[key]


def _raw(change: Callable[[Array], Array]):
    """Change the packed numbers as they are on the wire."""

    def fault(content: RecordDict, memory: dict) -> RecordDict:
        key, record = _record(content)
        arrays = dict(record.items())
        name = _numbers(arrays)
        arrays[name] = change(arrays[name])
        content[key] = ArrayRecord(arrays)
        return content

    return fault


def _is_manifest(array: Array) -> bool:
    try:
        return isinstance(json.loads(array.numpy().tobytes()), dict)
    except ValueError:
        return False


def _numbers(arrays: dict[str, Array]) -> str:
    return max(
        (name for name in arrays if not _is_manifest(arrays[name])),
        key=lambda name: len(arrays[name].data),
    )


def _oversize(content: RecordDict, memory: dict) -> RecordDict:
    """Declare a tensor of 2^50 numbers, send what was sent before."""
    key, record = _record(content)
    arrays = dict(record.items())
    name = next(name for name in arrays if _is_manifest(arrays[name]))
    manifest = json.loads(arrays[name].numpy().tobytes())
    manifest["tensors"][0][1] = [1 << 25, 1 << 25]
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    arrays[name] = Array(text.copy())
    content[key] = ArrayRecord(arrays)
    return content


def _bomb(array: Array) -> Array:
    """A few bytes that say they are 2^42 numbers: what reads them must not make room first."""
    stream = io.BytesIO()
    header = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": (1 << 42,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return Array(array.dtype, (1 << 42,), array.stype, stream.getvalue() + bytes(64))


def _truncate(array: Array) -> Array:
    return Array(array.dtype, array.shape, array.stype, array.data[: len(array.data) // 2])


def _replay(content: RecordDict, memory: dict) -> RecordDict:
    """The first update once more, under the new round's number."""
    reply = TrainReply.from_content(content)
    first = memory.setdefault("first", reply)
    return replace(reply, deltas=first.deltas).to_content(CODEC)


def _weight(value: float):
    return _fields(metrics=lambda reply: {**reply.metrics, "examples": value})


def _nan_somewhere(value: np.ndarray) -> np.ndarray:
    spoilt = value.copy()
    spoilt.flat[0] = np.nan
    return spoilt


def _without_one(deltas: Deltas) -> Deltas:
    deltas.pop(next(iter(deltas)), None)
    return deltas


def _reshaped(deltas: Deltas) -> Deltas:
    for name in list(deltas)[:1]:
        deltas[name] = deltas[name].reshape(1, *deltas[name].shape)
    return deltas


@dataclass(frozen=True)
class Fault:
    """One kind of hostile reply.

    ``change``: honest content -> hostile content. ``since``: first hostile round. ``seen``: whether the server can see
    it at all. ``tensors``: whether it needs tensors to travel (else what channels are told, or metrics, are enough).
    """

    change: Callable[[RecordDict, dict], RecordDict]
    since: int = 1
    seen: bool = True
    needs: str = "values"


FAULTS: dict[str, Fault] = {
    "nan": Fault(each_value(_nan_somewhere)),
    "inf": Fault(each_value(lambda value: np.full_like(value, np.inf))),
    "times_1e8": Fault(each_value(lambda value: 1e8 * value), needs="tensors"),
    "flip_x10": Fault(each_value(lambda value: -10 * value)),
    "zero": Fault(each_value(np.zeros_like), seen=False, needs="tensors"),
    "missing_key": Fault(_tensors(_without_one), needs="tensors"),
    "extra_key": Fault(
        _tensors(lambda d: {**d, "slots.0.stowaway": np.ones(3, np.float32)}), needs=""
    ),
    "wrong_shape": Fault(_tensors(_reshaped), needs="tensors"),
    "wrong_dtype": Fault(_raw(lambda array: Array(array.numpy().astype(np.float64)))),
    "weight_1e12": Fault(_weight(1e12), needs=""),
    "weight_negative": Fault(_weight(-48.0), needs=""),
    "weight_nan": Fault(_weight(float("nan")), needs=""),
    "stale_round": Fault(_fields(round=lambda reply: reply.round - 1), needs=""),
    "replay": Fault(_replay, since=2, needs="tensors"),
    "truncated": Fault(_raw(_truncate)),
    "oversize_shape": Fault(_oversize),
    "bomb": Fault(_raw(_bomb)),
    "wrong_type": Fault(_fields(type_key=lambda reply: "other@nf4"), needs=""),
    "wrong_code": Fault(_fields(code_hash=lambda reply: "0123456789abcdef"), needs=""),
}


@dataclass
class Hostile:
    """Turns the train replies of some of a toy federation's clients; call it as ``prepare``.

    ``fault`` None: they answer with an error instead, which is the run without them.
    """

    clients: tuple[str, ...]
    fault: Fault | None
    since: int = 1
    memories: dict = field(default_factory=dict)

    def __call__(self, federation, grid) -> None:
        honest = federation.train

        def train(message: Message, context) -> Message:
            client_id, _, _, _ = federation.who(context)
            if client_id not in self.clients:
                return honest(message, context)
            round = int(message.content["config"]["round"])
            if self.fault is None and round >= self.since:
                return Message(error_content("absent"), reply_to=message)
            reply = honest(message, context)
            if self.fault is not None:
                memory = self.memories.setdefault(client_id, {})
                reply.content = self.fault.change(reply.content, memory)
            return reply

        federation.train = train
