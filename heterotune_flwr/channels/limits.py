"""Bounds on what a server may send a deployed node; what lies beyond is refused in one line, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import RefusedByNodeError

#: Largest magnitude, and root mean square, of what a training starts from.
LARGEST, TYPICAL = 1e3, 30.0


def refuse(reason: str) -> NoReturn:
    """Raise the error whose line the server is told."""
    raise RefusedByNodeError(reason)


def within(name: str, value: Any, least: float, most: float) -> None:
    """Refuse what is no number from ``least`` to ``most``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # NaN neither
        refuse(f"{name} is {value!r}; this node takes {least:g} to {most:g}")


def bounded(
    tensors: Mapping[str, NDArray[np.float32]], what: str, largest: float, typical: float = math.inf
) -> None:
    """Refuse numbers that are not finite, larger than ``largest``, or in root mean square than ``typical``."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            refuse(f"{what} hold numbers that are not finite ({name[:80]})")
        if value.size and (
            float(np.abs(value).max()) > largest
            or math.sqrt(float(np.square(value, dtype=np.float64).mean())) > typical
        ):
            size = f"{largest:g}" + (f" ({typical:g} on average)" if typical < math.inf else "")
            refuse(f"{what} hold numbers beyond {size} ({name[:80]})")
