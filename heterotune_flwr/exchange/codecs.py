"""How numbers are written on the wire: the shipped codecs, and those of installed packages.

Two kinds: a :class:`Codec` writes number for number; a :class:`RecordCodec` writes the numbers of a whole record at
once (blocks with scales, the largest alone) in a size that both sides know beforehand.

A codec of one's own is one of the two, named by an entry point of the group ``heterotune_flwr.codecs`` in a package
that is installed on the server and on every client (:mod:`heterotune_flwr.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange import blockwise, sparse
from heterotune_flwr.exchange.halves import from_bf16, to_bf16
from heterotune_flwr.plugins import load_plugin, plugin_names

Floats = NDArray[np.float32]
#: How many numbers every tensor of a record has, in the record's order.
Sizes = Sequence[int]


@dataclass(frozen=True)
class Codec:
    """Writes float32 numbers as numbers of another type, one for one.

    Attributes
    ----------
    dtype
        numpy dtype on the wire, with byte order: ``<u2``.
    encode, decode
        Flat float32 array -> flat array of ``dtype`` of the same length, and back. ``decode`` must take whatever
        numbers of that dtype a client may send.
    lossy
        Whether what it drops is worth keeping for the next round (``exchange.error_feedback``). Such a codec is not
        used for the frozen maps.

    """

    dtype: str
    encode: Callable[[Floats], NDArray[Any]]
    decode: Callable[[NDArray[Any]], Floats]
    lossy: bool = False

    def length(self, sizes: Sizes) -> int:
        """Entries of ``dtype`` that tensors of these sizes take."""
        return sum(sizes)

    def write(self, values: Floats, sizes: Sizes) -> NDArray[Any]:
        """Encode the flat numbers of a record."""
        return self.encode(values)

    def read(self, data: NDArray[Any], sizes: Sizes) -> Floats:
        """Decode what was received; its length has been checked."""
        return self.decode(data)


@dataclass(frozen=True)
class RecordCodec:
    """Writes all numbers of a record at once.

    Attributes
    ----------
    dtype
        numpy dtype on the wire: ``|u1`` for bytes.
    length
        Sizes of the tensors -> entries of ``dtype``. The receiver refuses any other length before it decodes.
    write
        (flat float32 array, sizes of its tensors) -> flat array of ``dtype`` of that length. Numbers that are not
        finite must arrive as not finite: the update gate has to see them.
    read
        The way back; raises ExchangeError for whatever ``write`` would not have written. It is given any bytes of the
        right length, and may allocate in proportion to the numbers announced: those have been bounded.
    lossy
        As for :class:`Codec`.
    sparse
        Whether it leaves numbers out. Fit for changes, which are small and come again, not for values.

    """

    dtype: str
    length: Callable[[Sizes], int]
    write: Callable[[Floats, Sizes], NDArray[Any]]
    read: Callable[[NDArray[Any], Sizes], Floats]
    lossy: bool = True
    sparse: bool = False


def _plain(dtype: str) -> Codec:
    def encode(values: Floats) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return values.astype(dtype)

    return Codec(dtype, encode, lambda values: values.astype(np.float32))


#: The shipped codecs, but for ``topk``, which is one for every share.
CODECS: dict[str, Codec | RecordCodec] = {
    "bf16": Codec("<u2", to_bf16, from_bf16),
    "fp16": _plain("<f2"),
    "fp32": _plain("<f4"),
    "int8": RecordCodec("|u1", blockwise.length(blockwise.INT8), *blockwise.coders(blockwise.INT8)),
    "nf4": RecordCodec("|u1", blockwise.length(blockwise.NF4), *blockwise.coders(blockwise.NF4)),
}
#: ``topk:0.1`` keeps the tenth of a record's numbers that are largest in magnitude.
TOPK = "topk"
#: Replaces a codec that would round frozen maps too coarsely.
PRECISE = "bf16"


def _to_unit8(values: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.rint(255.0 * np.clip(np.nan_to_num(values), 0.0, 1.0)), dtype=np.uint8)


#: For numbers from 0 to 1 alone, so no choice for ``exchange.codec``: what predictions travel as.
UNIT8 = "unit8"


def as_numbers(data: bytes) -> Floats:
    """Bytes as numbers that :data:`UNIT8` carries exactly, a byte each."""
    return np.frombuffer(data, np.uint8).astype(np.float32) / np.float32(255.0)


def as_bytes(values: Floats) -> NDArray[np.uint8]:
    """Inverse of :func:`as_numbers`, in the shape of ``values``; whatever came is some byte."""
    return _to_unit8(values)


_SPECIAL = {
    UNIT8: Codec("|u1", _to_unit8, lambda values: values.astype(np.float32) / np.float32(255.0))
}


def topk_name(share: float) -> str:
    """Name of the codec that keeps this share of the numbers: ``topk:0.1``.

    Raises ExchangeError: the share is not from 0.001 to 1.
    """
    if not sparse.LEAST <= share <= 1.0:  # NaN neither
        raise ExchangeError(f"exchange.top_k is {share}; give a share from {sparse.LEAST} to 1")
    digits = f"{share:.6f}".rstrip("0").rstrip(".")
    return f"{TOPK}:{digits}"


def _topk(name: str) -> RecordCodec:
    digits = name.partition(":")[2]
    try:
        share = float(digits)
    except ValueError:
        share = float("nan")
    if topk_name(share) != name:  # one way to write each share
        raise ExchangeError(f"codec {name!r} is malformed; topk:0.1 keeps the largest tenth")
    return RecordCodec("|u1", *sparse.coders(share), sparse=True)


def find_codec(name: str) -> Codec | RecordCodec:
    """Return a codec by name (ExchangeError: there is none of that name, or an installed package's is no codec)."""
    found = CODECS.get(name) or _SPECIAL.get(name)
    if found is not None:
        return found
    if name.startswith(f"{TOPK}:"):
        return _topk(name)
    if name not in plugin_names("codecs"):
        known = ", ".join((*CODECS, TOPK, *plugin_names("codecs")))
        raise ExchangeError(f"exchange.codec is {name!r}; choose one of {known}")
    try:
        codec = load_plugin("codecs", name)
    except ConfigError as error:
        raise ExchangeError(str(error)) from error
    if not isinstance(codec, Codec | RecordCodec):
        raise ExchangeError(
            f"codec {name!r} is a {type(codec).__name__}, not an exchange.codecs.Codec"
        )
    return codec


def precise(name: str) -> str:
    """The codec itself where it is at least as exact as bf16, else ``bf16``: for maps, factors and controls."""
    return PRECISE if name.startswith(TOPK) or find_codec(name).lossy else name
