"""How numbers are written on the wire: the shipped codecs, and those of installed packages.

A codec of one's own is a :class:`Codec`, named by an entry point of the group ``heterotune_flwr.codecs`` in a package
that is installed on the server and on every client (:mod:`heterotune_flwr.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.plugins import load_plugin, plugin_names


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

    """

    dtype: str
    encode: Callable[[NDArray[np.float32]], NDArray[Any]]
    decode: Callable[[NDArray[Any]], NDArray[np.float32]]


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16 (nearest, ties to even); NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype("<u2")
    # Adding the rounding term may carry a NaN's mantissa over into infinity or zero.
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper).astype("<u2")


def _from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _plain(dtype: str) -> Codec:
    def encode(values: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return values.astype(dtype)

    return Codec(dtype, encode, lambda values: values.astype(np.float32))


#: The shipped codecs.
CODECS: dict[str, Codec] = {
    "bf16": Codec("<u2", _to_bf16, _from_bf16),
    "fp16": _plain("<f2"),
    "fp32": _plain("<f4"),
}


def _to_unit8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(np.rint(255.0 * np.clip(np.nan_to_num(values), 0.0, 1.0)), dtype=np.uint8)


#: For numbers from 0 to 1 alone, so no choice for ``exchange.codec``: what predictions travel as.
UNIT8 = "unit8"
_SPECIAL = {
    UNIT8: Codec("|u1", _to_unit8, lambda values: values.astype(np.float32) / np.float32(255.0))
}


def codec_names() -> tuple[str, ...]:
    """Shipped codecs, then those of installed packages."""
    return (*CODECS, *(name for name in plugin_names("codecs") if name not in CODECS))


def find_codec(name: str) -> Codec:
    """Return a codec by name.

    Raises
    ------
    ExchangeError
        There is none of that name, or an installed package's is no codec.

    """
    for known in (CODECS, _SPECIAL):
        if name in known:
            return known[name]
    if name not in plugin_names("codecs"):
        raise ExchangeError(f"exchange.codec is {name!r}; choose one of {', '.join(codec_names())}")
    try:
        codec = load_plugin("codecs", name)
    except ConfigError as error:
        raise ExchangeError(str(error)) from error
    if not isinstance(codec, Codec):
        raise ExchangeError(
            f"codec {name!r} is a {type(codec).__name__}, not an exchange.codecs.Codec"
        )
    return codec
