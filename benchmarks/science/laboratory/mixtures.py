"""What experts add to final states, mixed: at work in the last slot, and answers of several mixtures at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from heterotune_flwr.data.examples import Example
from heterotune_flwr.dema.access import slot_layers
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter, Tensors
from heterotune_flwr.tuning.generation import answer_prompts
from heterotune_flwr.tuning.task import Task

#: States ``... x d`` -> what is added to them.
Adds = Callable[[Tensor], Tensor]
#: Rows of one decoding step.
_ROWS = 720


@dataclass(frozen=True)
class Mixture:
    """What is added to final states."""

    adds: Adds

    def __call__(self, states: Tensor) -> Tensor:
        """What is added to these, in float32."""
        return self.adds(states)

    @contextmanager
    def at_work(self, adapter: AttachedAdapter) -> Iterator[None]:
        """Let it act in the last slot, in the place of what the adapter holds."""
        last: Any = slot_layers(adapter.model)[-1]
        last.delta = lambda _name, states: self.adds(states)
        try:
            yield
        finally:
            del last.delta


def acting(adapter: AttachedAdapter, values: Tensors) -> Adds:
    """What the last slot adds with these values (by canonical name), whatever the adapter holds."""
    last: Any = slot_layers(adapter.model)[-1]
    (name,) = last.active_names()
    delta = type(last).delta
    ours = {id(parameter): name for name, parameter in last.named_parameters()}
    held = {
        ours[id(parameter)]: torch.from_numpy(np.asarray(values[key]))
        for key, parameter in last.trainable(name).items()
    }
    module = _Delta(last, lambda states: delta(last, name, states))
    return lambda states: functional_call(module, {f"layer.{k}": v for k, v in held.items()}, states)  # fmt: skip


class _Delta(torch.nn.Module):
    """A slot as a function of its parameters."""

    def __init__(self, layer: torch.nn.Module, delta: Adds) -> None:
        super().__init__()
        self.layer, self._delta = layer, delta

    def forward(self, states: Tensor) -> Tensor:
        return self._delta(states)


def mixture(
    experts: Sequence[Adds], weights: Sequence[float] | Tensor | Callable[[Sequence[Tensor]], Tensor]
) -> Mixture:  # fmt: skip
    """A weighted sum of what experts add; weights are numbers, or a function of that."""

    def adds(states: Tensor) -> Tensor:
        added = [expert(states) for expert in experts]
        total = torch.zeros_like(states, dtype=torch.float32)
        given = weights(added) if callable(weights) else weights
        for index, one in enumerate(added):
            weight = given[..., index : index + 1] if callable(weights) else given[index]
            total = total + weight * one
        return total

    return Mixture(adds)


@torch.no_grad()
def answers_of(
    adapter: AttachedAdapter,
    task: Task,
    mixtures: Sequence[Mixture],
    examples: Sequence[Example],
    data: DataConfig,
) -> list[list[str]]:
    """Greedy answers of every mixture to every example; all mixtures share a prompt's pass through the backbone."""
    prompts = answer_prompts(task, examples, data)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, _ROWS // len(mixtures))
    found: list[list[str]] = [[""] * len(prompts) for _ in mixtures]
    with adapter.bare():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            tokens = _decoded(adapter, task, mixtures, [prompts[i] for i in batch], data)
            for row, text in enumerate(_texts(adapter, task, tokens)):
                found[row % len(mixtures)][batch[row // len(mixtures)]] = text
    return found


def _decoded(
    adapter: AttachedAdapter,
    task: Task,
    mixtures: Sequence[Mixture],
    prompts: Sequence[Sequence[int]],
    data: DataConfig,
) -> NDArray[np.int64]:
    """Tokens ``(prompts x mixtures) x steps``, prompt by prompt."""
    base, each = adapter.backbone.model, len(mixtures)
    body, head, pad = base.get_decoder(), base.get_output_embeddings(), adapter.backbone.pad_id
    longest, ends = max(map(len, prompts)), _ends(adapter, task)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = body(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    cache, states = out.past_key_values, out.last_hidden_state[:, -1].repeat_interleave(each, 0)
    cache.batch_repeat_interleave(each)
    mask, place = (t.repeat_interleave(each, 0) for t in (mask, places[:, -1:]))
    done = torch.zeros(len(states), dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) < data.max_answer_tokens and not done.all():
        if written:
            place = place + 1
            mask = torch.cat([mask, torch.ones_like(place)], 1)
            out = body(
                input_ids=written[-1][:, None], attention_mask=mask, position_ids=place,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            states = out.last_hidden_state[:, -1]
        added = torch.empty_like(states, dtype=torch.float32)
        for index, one in enumerate(mixtures):
            added[index::each] = one(states[index::each])
        token = head((states.float() + added).to(states.dtype).contiguous()).argmax(-1)
        written.append(token.masked_fill(done, pad))
        done |= torch.isin(token, ends)
        stop = task.form.stop
        if stop is not None and len(written) % 8 == 0:  # whole texts are cut at the stop afterwards
            tokens = torch.stack(written, 1).numpy()
            done |= torch.tensor([stop in t for t in _raw(adapter, task, tokens)])
    return torch.stack(written, 1).numpy()


def _ends(adapter: AttachedAdapter, task: Task) -> Tensor:
    """Tokens at which an answer ends."""
    ends = {adapter.backbone.tokenizer.eos_token_id, *task.form.ending[-1:]}
    return torch.tensor(sorted(end for end in ends if end is not None))


def _raw(adapter: AttachedAdapter, task: Task, tokens: NDArray[np.int64]) -> list[str]:
    ends = set(_ends(adapter, task).tolist())
    rows = [list(takewhile(lambda token: token not in ends, row)) for row in tokens.tolist()]
    texts: list[str] = adapter.backbone.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


def _texts(adapter: AttachedAdapter, task: Task, tokens: NDArray[np.int64]) -> list[str]:
    """Answers without what follows their end."""
    stop = task.form.stop
    return [
        (text if stop is None else text.partition(stop)[0]).strip()
        for text in _raw(adapter, task, tokens)
    ]
