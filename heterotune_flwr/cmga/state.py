"""Saving a chain's state without pickle: arrays as safetensors, the rest as JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from heterotune_flwr.cmga.base import State
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.storage import save_tensors

_ARRAY = "__array__"


def _split(value: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {_ARRAY: path}
    if isinstance(value, dict):
        return {key: _split(item, f"{path}/{key}", arrays) for key, item in value.items()}
    return value


def _join(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {_ARRAY}:
        return arrays[value[_ARRAY]]
    return {key: _join(item, arrays) for key, item in value.items()}


def save_state(path: Path, state: State) -> None:
    """Save a state (nested dictionaries of numbers, texts and arrays) atomically."""
    arrays: dict[str, NDArray[Any]] = {}
    tree = _split(state, "", arrays)
    save_tensors(path, arrays, {"state": json.dumps(tree)})


def load_state(path: Path) -> State:
    """Inverse of :func:`save_state`; ExchangeError when the file is not such a state."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            tree = json.loads((file.metadata() or {})["state"])
        state: State = _join(tree, arrays)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ExchangeError(f"{path} is not a saved CMGA state: {error}") from error
    return state
