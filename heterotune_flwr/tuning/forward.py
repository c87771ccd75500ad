"""The adapted decoder on examples: whole, up to a block, or from a block on.

What lies below the lowest trained slot is frozen, so its output can be computed once (:func:`block_inputs`)
and training can start from there (:func:`states_from_block`). To start at block b, the blocks
below are replaced, for the duration of one call, by stand-ins that compute nothing; the model's own
code then prepares masks and positions as always, whatever its family.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heterotune_flwr.backbones.structure import slot_blocks
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.cores import first_core_block
from heterotune_flwr.tuning.task import EncodedSet

log = logging.getLogger(__name__)


class _StandIn(nn.Module):
    """Takes a block's place: gives ``states`` if it has some, else passes its input on.

    What a model reads off its blocks (a layer's kind of attention, say) is read off the block.
    """

    def __init__(self, block: nn.Module, states: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        # Not registered: the block keeps its one place in the model.
        object.__setattr__(self, "_block", block)
        self._states = states
        self._as_tuple = as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class."""
        states = self._states
        if states is None:
            states = args[0] if args else kwargs["hidden_states"]
        return (states,) if self._as_tuple else states


def first_block(adapter: AttachedAdapter) -> int | None:
    """Index of the lowest block with something trained; None for the last slot alone (after all blocks).

    0 for LoRA, whose lowest layers are in the first block.
    """
    if adapter.kind != "dema":
        return 0
    slots, layers = adapter.method.slots, adapter.backbone.layers
    block = None if adapter.lowest == slots - 1 else slot_blocks(slots, layers)[adapter.lowest]
    core = first_core_block(adapter.method, layers) if adapter.lowest == 0 else None
    return min((b for b in (block, core) if b is not None), default=None)


def final_states(adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int]) -> Tensor:
    """Final normalised states ``R x d`` at the loss positions of some examples.

    Where an example is read in several lines that begin alike, its prompt is read once, unless gradients are needed.
    """
    if not encoded.reads or torch.is_grad_enabled():
        return adapter.reader.states_at(*encoded.lines(indices))
    states = adapter.reader.states_behind(
        [encoded.inputs[index] for index in indices],
        [read.suffix for read in encoded.reads],
        [read.offsets for read in encoded.reads],
    )
    return states.flatten(0, 1)


def block_inputs(
    adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int], block: int
) -> list[Tensor]:
    """What enters block ``block`` (``T_i x d`` per line, no padding); nothing above it is computed."""
    lines, _ = encoded.lines(indices)
    return [states for (states,) in adapter.reader.entering(lines, [block])]


def states_from_block(
    adapter: AttachedAdapter,
    encoded: EncodedSet,
    indices: Sequence[int],
    block: int,
    inputs: Sequence[Tensor],
) -> Tensor:
    """As :func:`final_states`, from what enters block ``block`` (one ``T_i x d`` per line)."""
    shape = (len(inputs), max(map(len, inputs)), adapter.backbone.hidden)
    hidden = torch.zeros(shape, dtype=inputs[0].dtype, device=adapter.reader.device)
    for row, states in enumerate(inputs):
        hidden[row, : len(states)] = states
    with _starting_at(adapter, block, hidden):
        return adapter.reader.states_at(*encoded.lines(indices))


@contextmanager
def _starting_at(adapter: AttachedAdapter, block: int, hidden: Tensor) -> Iterator[None]:
    blocks = adapter.reader.blocks
    originals = [blocks[index] for index in range(block)]
    as_tuple = _gives_tuples(adapter)
    try:
        for index, original in enumerate(originals):
            states = hidden if index == block - 1 else None
            blocks[index] = _StandIn(original, states, as_tuple)
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


def _gives_tuples(adapter: AttachedAdapter) -> bool:
    """Whether the blocks of this model return tuples; found out once per attached adapter."""
    if adapter.blocks_give_tuples is None:
        seen: list[bool] = []
        hook = adapter.reader.blocks[0].register_forward_hook(
            lambda _module, _args, output: seen.append(isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                adapter.reader.final_states([[adapter.reader.pad_id]])
        finally:
            hook.remove()
        adapter.blocks_give_tuples = seen[0]
    return adapter.blocks_give_tuples


@torch.no_grad()
def can_start_at(adapter: AttachedAdapter, encoded: EncodedSet, block: int) -> bool:
    """Whether this family's upper blocks need nothing but the states entering ``block``.

    Not so where upper layers reuse keys and values of lower ones (Gemma 3n), for instance. Found out once per
    attached adapter and block, on one example, instead of trusting a list of families.
    """
    known = adapter.startable.get(block)
    if known is None:
        try:
            inputs = block_inputs(adapter, encoded, [0], block)
            short = states_from_block(adapter, encoded, [0], block, inputs).float()
            full = adapter.reader.states_at(*encoded.lines([0])).float()
            known = torch.allclose(short, full, rtol=0.05, atol=0.02 * float(full.abs().mean()))
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
            log.info("%s: %s", type(error).__name__, error)
            known = False
        if not known:
            log.warning(
                "%s: its upper blocks need more than the states below them, so these are not kept",
                adapter.backbone.type_key,
            )
        adapter.startable[block] = known
    return known
