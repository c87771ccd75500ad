"""The decoder on padded batches: whole, up to a block, or from a block on.

What lies below the lowest trained slot is frozen, so its output can be computed once (:func:`run`
with ``capture``) and training can start from there (``resume``). To start at block b, the blocks
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

from heterotune_flwr.alignment.views import blocks_read, entering, text_mean
from heterotune_flwr.backbones.structure import find_structure, slot_blocks
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


def blocks_of(adapter: AttachedAdapter) -> nn.ModuleList:
    """The decoder blocks of the adapter's backbone."""
    model = adapter.backbone.model
    blocks = model.get_submodule(find_structure(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


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


def _padded(adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int]) -> list[Tensor]:
    """Token ids and attention mask ``B x T`` of some examples, padded on the right."""
    longest = max(len(encoded.inputs[i]) for i in indices)
    pad = adapter.backbone.pad_id
    ids = torch.full((len(indices), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(indices), longest), dtype=torch.long)
    for row, index in enumerate(indices):
        length = len(encoded.inputs[index])
        ids[row, :length] = torch.tensor(encoded.inputs[index])
        mask[row, :length] = 1
    return [ids.to(adapter.backbone.device), mask.to(adapter.backbone.device)]


def final_states(adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int]) -> Tensor:
    """Final normalised states ``R x d`` at the loss positions of some examples."""
    ids, mask = _padded(adapter, encoded, indices)
    output = adapter.body(input_ids=ids, attention_mask=mask, use_cache=False)
    return _at_positions(output.last_hidden_state, encoded, indices)


def _at_positions(states: Tensor, encoded: EncodedSet, indices: Sequence[int]) -> Tensor:
    owners = [row for row, index in enumerate(indices) for _ in encoded.positions[index]]
    positions = [position for index in indices for position in encoded.positions[index]]
    chosen: Tensor = states[owners, positions]
    return chosen


def block_inputs(
    adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int], block: int
) -> list[Tensor]:
    """What enters block ``block`` (``T_i x d`` per example, no padding); nothing above it is computed."""
    return [states for (states,) in _inputs_of(adapter, encoded, indices, [block])]


def text_states(
    adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int]
) -> list[Tensor]:
    """The second view of examples (``2 d`` each; :mod:`..alignment.views`); nothing above its blocks is computed."""
    read = blocks_read(adapter.backbone.layers)
    return [text_mean(states) for states in _inputs_of(adapter, encoded, indices, read)]


def _inputs_of(
    adapter: AttachedAdapter, encoded: EncodedSet, indices: Sequence[int], numbers: Sequence[int]
) -> list[list[Tensor]]:
    """What enters some blocks, in rising order: per example one ``T_i x d`` for each, without padding."""
    ids, mask = _padded(adapter, encoded, indices)
    blocks = [blocks_of(adapter)[number] for number in numbers]
    states = entering(adapter.body, blocks, ids, mask)
    lengths = [len(encoded.inputs[i]) for i in indices]
    return [[part[row, :length] for part in states] for row, length in enumerate(lengths)]


def states_from_block(
    adapter: AttachedAdapter,
    encoded: EncodedSet,
    indices: Sequence[int],
    block: int,
    inputs: Sequence[Tensor],
) -> Tensor:
    """As :func:`final_states`, from what enters block ``block`` (one ``T_i x d`` per example)."""
    ids, mask = _padded(adapter, encoded, indices)
    hidden = torch.zeros(
        (*ids.shape, adapter.backbone.hidden), dtype=inputs[0].dtype, device=ids.device
    )
    for row, states in enumerate(inputs):
        hidden[row, : len(states)] = states
    with _starting_at(adapter, block, hidden):
        output = adapter.body(input_ids=ids, attention_mask=mask, use_cache=False)
    return _at_positions(output.last_hidden_state, encoded, indices)


@contextmanager
def _starting_at(adapter: AttachedAdapter, block: int, hidden: Tensor) -> Iterator[None]:
    blocks = blocks_of(adapter)
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
        hook = blocks_of(adapter)[0].register_forward_hook(
            lambda _module, _args, output: seen.append(isinstance(output, tuple))
        )
        token = torch.tensor([[adapter.backbone.pad_id]])
        try:
            with torch.no_grad():
                adapter.body(input_ids=token.to(adapter.backbone.device), use_cache=False)
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
            full = final_states(adapter, encoded, [0]).float()
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
