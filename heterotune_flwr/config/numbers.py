"""Numbers that no setting can have: endless ones, NaN, and whole ones that no counter holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from heterotune_flwr.errors import ConfigError

#: Bound of rounds, steps, tokens, widths; and of seeds and what a strategy of one's own has, which are any 63 bits.
_LARGEST, _LARGEST_LONG = 2**31 - 1, 2**63 - 1
_LONG = ("run.seeds", "strategies.")


def check_numbers(value: Any, where: str = "") -> None:
    """Name the first number below ``value``, a configuration or a part of it, that none can be (ConfigError)."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            check_numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError.of(where, value, "it must be a finite number")
    elif isinstance(value, int):
        largest = _LARGEST_LONG if where.startswith(_LONG) else _LARGEST
        if abs(value) > largest:
            raise ConfigError(
                f"{where} is a number of too many digits, it must be at most {largest}"
            )
