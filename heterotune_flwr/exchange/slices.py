"""Slices of a tensor along any of its axes: a window that may begin anywhere and goes round (numpy only).

The one rule by which HeteroFL's and FedRolex's sub-models are cut out of their parent, on the server as on a client.
An axis that is as long in the slice as in the parent is not cut; of every other axis of length n the slice holds
``start, start + 1, ...`` modulo n. ``start = 0`` are HeteroFL's leading slices (arXiv 2010.01264); FedRolex (arXiv
2212.01548) moves it by one every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ConfigError

#: What a slice of a LLaMA has fewer of, by its name in ``config.json``.
SLICED = ("hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads")
_LARGEST_DENOMINATOR = 64


def as_fraction(width: float) -> Fraction:
    """A width as the simple fraction it stands for (0.333 is 1/3)."""
    return Fraction(width).limit_denominator(_LARGEST_DENOMINATOR)


def sliced_sizes(sizes: Mapping[str, int], width: float, name: str) -> dict[str, int]:
    """The :data:`SLICED` sizes of a parent at a width.

    Raises ConfigError: one of them times the width is no whole number; says which widths are possible.
    """
    part, found = as_fraction(width), {}
    for key in SLICED:
        size = part * sizes[key]
        if size.denominator != 1 or size < 1:
            groups = sizes["num_key_value_heads"]
            choices = ", ".join(str(Fraction(n, groups)) for n in range(1, groups + 1))
            raise ConfigError(
                f"a slice of width {part} of {name} is impossible: its {key} is {sizes[key]}; with {groups} "
                f"key-value heads choose ratios among {choices}"
            )
        found[key] = int(size)
    return found


def window(parent: int, part: int, start: int) -> NDArray[np.intp]:
    """Positions on one axis of length ``parent`` that a slice of length ``part`` holds, in its order.

    Raises ValueError: the slice is longer than the axis, or has no length.
    """
    if not 1 <= part <= parent:
        raise ValueError(f"a slice of length {part} of an axis of length {parent}")
    if part == parent:
        return np.arange(parent)
    return (start + np.arange(part)) % parent


def open_mesh(parent: Sequence[int], part: Sequence[int], start: int) -> tuple[NDArray[Any], ...]:
    """Index of a slice of shape ``part`` in a tensor of shape ``parent`` (ValueError as in :func:`window`)."""
    if len(parent) != len(part):
        raise ValueError(f"a slice of shape {list(part)} of a tensor of shape {list(parent)}")
    axes = [window(n, k, start) for n, k in zip(parent, part, strict=True)]
    return np.ix_(*axes)
