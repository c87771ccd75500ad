"""Flat arrays out of a Flower record without trusting what their headers say.

``Array.numpy()`` evaluates the header as a Python literal and allocates what it announces before it looks for the
bytes. Here the header must be the one line that numpy writes for a flat array, and the bytes must be there.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.flower import ArrayRecord

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|][a-z][0-9])', 'fortran_order': False, 'shape': \((0|[1-9][0-9]{0,11}),\), \} *\n"
)


def flat_array(record: ArrayRecord, key: str, dtype: str) -> NDArray[Any]:
    """Return the flat array ``key`` of a record, read-only and without a copy.

    Raises ExchangeError: it is missing, damaged, of another dtype, or not flat.
    """
    if key not in record:
        raise ExchangeError(f"packed tensors lack the array {key!r}")
    array = record[key]
    data = array.data
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:end]) if data.startswith(_MAGIC) else None
    if array.stype != "numpy.ndarray" or header is None:
        raise ExchangeError(f"packed array {key!r} cannot be read: it is no flat numpy array")
    wanted, count = np.dtype(dtype), int(header[2])
    if header[1].decode() != wanted.str or (array.dtype, array.shape) != (str(wanted), (count,)):
        raise ExchangeError(
            f"packed array {key!r} is {array.dtype[:20]}{list(array.shape)[:4]}, expected flat {dtype}"
        )
    if len(data) - end != count * wanted.itemsize:
        raise ExchangeError(
            f"packed array {key!r} announces {count} numbers in {len(data) - end} bytes"
        )
    return np.frombuffer(data, dtype=wanted, offset=end)
