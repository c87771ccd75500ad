"""Final normalised states at the loss positions: recomputed each step, or kept.

With the last slot only, everything the adapter reads is frozen. The states of a client's examples
are then computed once, with the adapter off, and kept in memory and on disk; a training step
touches neither the backbone's weights nor its time. The numbers are those of the full route: the
adapter adds to a state exactly what its layer adds inside the model.

A list of examples is kept as a whole and computed in batches that depend on the list alone. So
the numbers do not depend on who asked first, or on how many workers there are (a batch mate can
change a state's last bits, and LLM.int8 looks for outliers over its whole batch).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.exchange.storage import atomic_write_bytes
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.task import EncodedSet

log = logging.getLogger(__name__)

#: Part of every key; raise it when the computation of states changes.
_VERSION = 1
#: Tokens of one batch of :func:`compute_states`, padding included.
_BATCH_TOKENS = 2048
#: States kept in memory per process.
_MEMORY_BYTES = 512 * 2**20


class Rows(Protocol):
    """A set of examples as rows of adapted states; rows belong to examples."""

    def __len__(self) -> int:
        """Count the examples."""

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return adapted states ``R x d``, targets ``R``, owners ``R`` (positions in ``indices``)."""


def _forward(adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int]) -> Tensor:
    """States ``R x d`` at the loss positions of some examples, padded to the longest of them."""
    device = adapter.backbone.device
    longest = max(len(encoded.inputs[i]) for i in indices)
    pad = int(adapter.backbone.tokenizer.pad_token_id)
    ids = torch.full((len(indices), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(indices), longest), dtype=torch.long)
    for row, index in enumerate(indices):
        length = len(encoded.inputs[index])
        ids[row, :length] = torch.tensor(encoded.inputs[index])
        mask[row, :length] = 1
    owners = [row for row, index in enumerate(indices) for _ in encoded.positions[index]]
    positions = [position for index in indices for position in encoded.positions[index]]
    output = adapter.body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    states: Tensor = output.last_hidden_state[owners, positions]
    return states


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where each example's rows lie in a flat table."""

    targets: Tensor
    offsets: list[int]

    @classmethod
    def of(cls, encoded: EncodedSet, device: torch.device) -> _Layout:
        offsets = [0]
        for targets in encoded.targets:
            offsets.append(offsets[-1] + len(targets))
        flat = [target for targets in encoded.targets for target in targets]
        return cls(torch.tensor(flat, dtype=torch.long, device=device), offsets)

    @property
    def one_each(self) -> bool:
        return self.offsets[-1] == len(self.offsets) - 1

    def select(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return (flat row numbers ``R``, owners ``R``) of some examples."""
        device = self.targets.device
        if self.one_each:
            chosen = torch.as_tensor(indices, dtype=torch.long, device=device)
            return chosen, torch.arange(len(indices), device=device)
        rows = [r for i in indices for r in range(self.offsets[i], self.offsets[i + 1])]
        owners = [
            n for n, i in enumerate(indices) for _ in range(self.offsets[i], self.offsets[i + 1])
        ]
        return torch.tensor(rows, device=device), torch.tensor(owners, device=device)


class FullRows:
    """The full route: the whole decoder in every call (LoRA, deeper slots)."""

    def __init__(self, adapter: AttachedAdapter, encoded: EncodedSet) -> None:
        self._adapter = adapter
        self._encoded = encoded
        self._layout = _Layout.of(encoded, adapter.backbone.device)

    def __len__(self) -> int:
        return len(self._encoded)

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Rows`."""
        chosen, owners = self._layout.select(indices)
        states = _forward(self._adapter, self._encoded, indices)
        return states, self._layout.targets[chosen], owners


class CachedRows:
    """The short route: kept states through the last slot alone."""

    def __init__(self, adapter: AttachedAdapter, encoded: EncodedSet) -> None:
        self._adapter = adapter
        self._layout = _Layout.of(encoded, adapter.backbone.device)
        self._states = frozen_states(adapter, encoded)

    def __len__(self) -> int:
        return len(self._layout.offsets) - 1

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Rows`."""
        chosen, owners = self._layout.select(indices)
        states = self._adapter.last_slot(self._states[chosen])
        return states, self._layout.targets[chosen], owners


def make_rows(adapter: AttachedAdapter, encoded: EncodedSet, cache: bool = True) -> Rows:
    """Rows of encoded examples by the shortest route (``cache``: keep states where possible)."""
    if cache and adapter.last_slot_only:
        return CachedRows(adapter, encoded)
    return FullRows(adapter, encoded)


def _batches(encoded: EncodedSet) -> Iterator[list[int]]:
    """Batches of similar length, at most ``_BATCH_TOKENS`` each: a function of the list alone."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded.inputs[i]), i))
    batch: list[int] = []
    for index in order:
        if batch and len(encoded.inputs[index]) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def compute_states(adapter: AttachedAdapter, encoded: EncodedSet) -> Tensor:
    """Frozen final normalised states ``R x d`` at all loss positions, in the examples' order."""
    counts = [len(positions) for positions in encoded.positions]
    parts: list[Tensor | None] = [None] * len(encoded)
    with adapter.disabled():
        for batch in _batches(encoded):
            states = _forward(adapter, encoded, batch)
            split = torch.split(states, [counts[i] for i in batch])
            for index, rows in zip(batch, split, strict=True):
                parts[index] = rows
    return torch.cat([part for part in parts if part is not None])


class _Memory:
    """States by key, the least recently used ones forgotten first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: str, states: Tensor) -> None:
        self._held[key] = states
        while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > self._limit:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()


#: Explicit per-process cache; holds frozen states only, nothing a client trained.
_memory = _Memory(_MEMORY_BYTES)


def forget_states() -> None:
    """Empty the memory cache; the disk cache stays."""
    _memory.clear()


@functools.cache
def _library_versions() -> tuple[str, ...]:
    """Read from disk once per process: every message asks for a key."""
    return tuple(version(name) for name in ("torch", "transformers", "bitsandbytes"))


def states_key(adapter: AttachedAdapter, encoded: EncodedSet) -> str:
    """Identity of frozen states: backbone, bits, device, libraries, and every token read."""
    backbone = adapter.backbone
    content = [
        _VERSION,
        backbone.fingerprint,
        backbone.spec.bits,
        backbone.device.type,
        *_library_versions(),
        encoded.digest,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def states_path(key: str) -> Path:
    """File of kept states on disk."""
    return cache_dir() / "states" / key[:2] / f"{key}.safetensors"


def _from_disk(path: Path, rows: int, hidden: int, device: torch.device) -> Tensor | None:
    try:
        states: Tensor = load_file(path, device=str(device))["states"]
    except (OSError, SafetensorError, KeyError):
        return None
    return states if tuple(states.shape) == (rows, hidden) else None


def frozen_states(adapter: AttachedAdapter, encoded: EncodedSet) -> Tensor:
    """States ``R x d`` from memory, from disk, or computed now and kept in both.

    Safe under concurrent workers: one computes while the others wait for its file, which appears
    whole or not at all. A disk that cannot be written costs time only.
    """
    key = states_key(adapter, encoded)
    held = _memory.get(key)
    if held is not None:
        return held
    backbone, path = adapter.backbone, states_path(key)
    rows = sum(len(positions) for positions in encoded.positions)
    states = _from_disk(path, rows, backbone.hidden, backbone.device)
    if states is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                states = _from_disk(path, rows, backbone.hidden, backbone.device)
                if states is None:
                    states = compute_states(adapter, encoded)
                    atomic_write_bytes(path, save({"states": states.cpu().contiguous()}))
        except OSError as error:
            log.warning("states are not kept on disk: %s", error)
            states = compute_states(adapter, encoded) if states is None else states
    _memory.put(key, states)
    return states
