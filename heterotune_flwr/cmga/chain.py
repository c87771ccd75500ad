"""Composing transforms, and the chains that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.cmga.base import Transform, Updates
from heterotune_flwr.exchange.trees import State

#: CMGA: no client pulls harder than the median one, every type counts the same.
DEFAULT_CHAIN: tuple[Mapping[str, Any], ...] = (
    {"transform": "clip_to_median"},
    {"transform": "within_type_mean"},
    {"transform": "combine", "weights": "equal"},
    {"transform": "server_opt"},
)

#: Plain example-weighted averaging of all clients, the ablation.
MEAN_CHAIN: tuple[Mapping[str, Any], ...] = (
    {"transform": "within_type_mean"},
    {"transform": "combine", "weights": "examples"},
)


def chain(*transforms: Transform) -> Transform:
    """Run transforms one after the other; the chain is a transform itself."""
    keys = [f"{index}.{transform.name}" for index, transform in enumerate(transforms)]

    def init() -> State:
        return {key: part.init() for key, part in zip(keys, transforms, strict=True)}

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        new: State = {}
        for key, part in zip(keys, transforms, strict=True):
            updates, new[key] = part.update(updates, state[key])
        return updates, new

    return Transform("chain", init, update)
