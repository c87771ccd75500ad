"""States of examples below everything that is trained: computed once, and kept.

A list of examples is kept as a whole and computed in batches that depend on the list alone. So
the numbers do not depend on who asked first, or on how many workers there are (a batch mate can
change a state's last bits, and LLM.int8 looks for outliers over its whole batch).

Slots that are not trained still act below the lowest trained one, with the values the server sent. While
they do nothing (all their outputs are zero), kept states live on disk; else in memory, for the round.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version

import torch
from torch import Tensor

from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.backbones.views import View
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.forward import block_inputs, final_states
from heterotune_flwr.tuning.state_cache import kept
from heterotune_flwr.tuning.task import EncodedSet

#: Part of every key; raise it when the computation of states changes.
_VERSION = 3


def compute_states(
    adapter: AttachedAdapter, encoded: EncodedSet, block: int | None = None
) -> Tensor:
    """Frozen states as a flat table, in the examples' order.

    ``block`` None: final normalised states ``S x d`` at all loss positions, below the last slot. Else what enters
    that block, ``sum T_i x d`` over all lines.
    """
    return _states_in(adapter.without_trained_slots(), adapter, encoded, block)


@torch.no_grad()
def _states_in(
    condition: AbstractContextManager[None],
    adapter: AttachedAdapter,
    encoded: EncodedSet,
    block: int | None,
) -> Tensor:
    """States of examples in their order: final ones, or (of every line) what enters a block."""
    if block is not None:
        encoded = encoded.by_line
    counts = [len(positions) * encoded.states_each for positions in encoded.positions]
    parts: list[Tensor | None] = [None] * len(encoded)
    with condition:
        for batch in batches(encoded.inputs):
            if block is None:
                states = final_states(adapter, encoded, batch)
                split: Sequence[Tensor] = torch.split(states, [counts[i] for i in batch])
            else:
                split = block_inputs(adapter, encoded, batch, block)
            for index, rows in zip(batch, split, strict=True):
                parts[index] = rows.clone()  # a view would keep the whole padded batch alive
    return torch.cat([part for part in parts if part is not None])


@functools.cache
def _library_versions() -> tuple[str, ...]:
    """Read from disk once per process: every message asks for a key."""
    return tuple(version(name) for name in ("torch", "transformers", "bitsandbytes"))


def states_key(
    adapter: AttachedAdapter, encoded: EncodedSet, block: int | None = None, bare: bool = False
) -> str:
    """Identity of frozen states: backbone, bits, device, libraries, every token read, what acts below.

    ``bare``: nothing does.
    """
    backbone = adapter.backbone
    content = [
        _VERSION,
        backbone.fingerprint,
        backbone.spec.bits,
        backbone.device.type,
        *_library_versions(),
        encoded.digest,
        block,
        "" if bare else adapter.frozen_digest(),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def frozen_states(
    adapter: AttachedAdapter, encoded: EncodedSet, block: int | None = None, on_disk: bool = True
) -> Tensor:
    """The table of :func:`compute_states`, kept (see :mod:`.state_cache`)."""
    lines = encoded.by_line.positions if block is None else encoded.by_line.inputs
    return kept(
        states_key(adapter, encoded, block),
        sum(len(line) for line in lines),
        adapter.backbone.hidden,
        adapter.backbone.device,
        lambda: compute_states(adapter, encoded, block),
        # What slots below add changes with every round: not worth a file.
        on_disk=on_disk and not adapter.frozen_digest(),
    )


def bare_states(adapter: AttachedAdapter, encoded: EncodedSet, cache: bool = True) -> Tensor:
    """Final normalised states ``S x d`` at all loss positions of the backbone alone.

    ``cache``: kept as :func:`frozen_states`.
    """

    def compute() -> Tensor:
        return _states_in(adapter.bare(), adapter, encoded, None)

    if not cache:
        return compute()
    rows = sum(len(line) for line in encoded.by_line.positions)
    backbone = adapter.backbone
    key = states_key(adapter, encoded, bare=True)
    return kept(key, rows, backbone.hidden, backbone.device, compute)


def bare_view(
    adapter: AttachedAdapter, view: View, encoded: EncodedSet, cache: bool = True
) -> Tensor:
    """A view of examples in the backbone alone (``n x parts d``, float32).

    ``cache``: kept as :func:`frozen_states`.
    """

    def compute() -> Tensor:
        with adapter.bare():
            return view.states(adapter.reader, encoded.inputs)

    if not cache:
        return compute()
    backbone = adapter.backbone
    key = f"{states_key(adapter, encoded, bare=True)}-{view.name}"
    return kept(key, len(encoded), view.parts * backbone.hidden, backbone.device, compute)
