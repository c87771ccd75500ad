"""How tensors travel and rest: packed Flower records, atomic safetensors files."""

from heterotune_flwr.exchange.codecs import CODECS, Codec, RecordCodec
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import (
    content_bytes,
    pack,
    payload_bytes,
    round_trip,
    tensor_digest,
    unpack,
)
from heterotune_flwr.exchange.storage import (
    atomic_write_bytes,
    atomic_write_text,
    load_tensors,
    save_tensors,
)

__all__ = [
    "CODECS",
    "Codec",
    "Expected",
    "RecordCodec",
    "atomic_write_bytes",
    "atomic_write_text",
    "content_bytes",
    "load_tensors",
    "pack",
    "payload_bytes",
    "round_trip",
    "save_tensors",
    "tensor_digest",
    "unpack",
]
