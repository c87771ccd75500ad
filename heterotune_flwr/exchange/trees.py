"""Saving nested state without pickle: arrays as safetensors, everything else as JSON in the file's header.

A *state* is made of dictionaries (keys: texts or whole numbers), lists, tuples, sets, numbers, texts, None and numpy
arrays. What comes back is equal bit for bit and of the same types.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.storage import save_tensors
from heterotune_flwr.jsons import parse_json

#: Nested dictionaries of numbers, texts and arrays.
State = dict[str, Any]
_ARRAY, _ITEMS, _TUPLE, _SET = "__array__", "__items__", "__tuple__", "__set__"
_TREE, _DIGEST = "state", "sha256"


def _split(value: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """The JSON-able form of a value; arrays go to ``arrays`` under their path."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {_ARRAY: path}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        parts = [(key, _split(item, f"{path}/{key}", arrays)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("__") for key, _ in parts):
            return dict(parts)
        return {_ITEMS: [list(part) for part in parts]}
    if isinstance(value, list | tuple | set | frozenset):
        ordered = value if isinstance(value, list | tuple) else sorted(value)
        items = [_split(item, f"{path}/{index}", arrays) for index, item in enumerate(ordered)]
        if isinstance(value, list):
            return items
        return {_TUPLE if isinstance(value, tuple) else _SET: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ExchangeError(f"{path or 'the state'} is a {type(value).__name__}, which cannot be saved")


def _join(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_join(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inner),) = value.items()
        if mark == _ARRAY:
            return arrays[inner]
        if mark == _ITEMS:
            return {key: _join(item, arrays) for key, item in inner}
        if mark in (_TUPLE, _SET):
            joined = [_join(item, arrays) for item in inner]
            return tuple(joined) if mark == _TUPLE else set(joined)
    return {key: _join(item, arrays) for key, item in value.items()}


def _digest(arrays: Mapping[str, NDArray[Any]], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, value.dtype.str, list(value.shape)]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def save_state(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> None:
    """Save a state atomically, with a checksum; ``metadata`` are further fields of the file's header.

    Raises ExchangeError: something in the state is of a type that cannot be saved; OSError: the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tree = json.dumps(_split(state, "", arrays))
    save_tensors(path, arrays, {**(metadata or {}), _TREE: tree, _DIGEST: _digest(arrays, tree)})


def read_header(path: Path) -> dict[str, str]:
    """A file's header fields without reading its arrays (ExchangeError: no complete safetensors file)."""
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ExchangeError(f"{path} cannot be read: {error}") from error


def load_state(path: Path) -> State:
    """Inverse of :func:`save_state` (ExchangeError: missing, torn, changed since, or no such state)."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        if _digest(arrays, header[_TREE]) != header[_DIGEST]:
            raise ValueError("its checksum does not fit its contents")
        state: State = _join(parse_json(header[_TREE]), arrays)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is not a saved state: {error}") from error
    return state
