"""LoRA inside the last blocks, beside that of the unembedding: for what a bare final state does not hold.

Channels may read whole texts, and slots may lie deeper. Then the last blocks learn too, by the same divergence. What
enters them in the bare backbone is kept, so a step runs them alone, forwards and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.export.distil import Loop, Report, Student, divergence, fit
from heterotune_flwr.export.lessons import Answers, Lessons, joined, others
from heterotune_flwr.export.low_rank import LowRank
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter, attach
from heterotune_flwr.tuning.forward import (
    block_inputs,
    can_start_at,
    first_block,
    states_from_block,
)
from heterotune_flwr.tuning.task import EncodedSet, Task

#: How many blocks learn, the last ones.
BLOCKS = 2
_STEPS = 200
_RATE = 0.006
#: States of one step: each has the logits of the whole vocabulary.
_STATES = 32
#: Bytes that what enters the blocks may take; further texts are left out.
_KEPT_BYTES = 2**30
#: Examples that are run at a time where nothing is learned.
_TOGETHER = 64


def reads_more(adapter: AttachedAdapter, task: Task) -> bool:
    """Whether a model depends on more than the bare final state: deeper slots, cores, or views of a text."""
    views = bool(adapter.method.views) and task.kind == "labels"
    return adapter.kind == "dema" and (views or first_block(adapter) is not None)


@dataclass(frozen=True, eq=False)
class Texts:
    """Examples as token ids, and what enters the lowest block that learns, on every line (``T x d``)."""

    encoded: EncodedSet
    entering: list[Tensor]


class DeepStudent:
    """A student whose states come from blocks that learn.

    ``adapter`` is a LoRA attached to the bare backbone; from ``block`` on it is trained.
    """

    def __init__(self, adapter: AttachedAdapter, student: Student, block: int) -> None:
        self.adapter = adapter
        self.student = student
        self.block = block
        above = adapter.reader.blocks[block:]
        inside = {id(parameter) for module in above for parameter in module.parameters()}
        self.parameters = {
            name: value for name, value in adapter.parameters.items() if id(value) in inside
        }

    @torch.no_grad()
    def texts(self, encoded: EncodedSet) -> Texts:
        """Read examples up to the block, in the bare backbone."""
        lines = encoded.by_line
        found: list[Tensor] = [torch.empty(0)] * len(lines)
        for batch in batches(lines.inputs):
            for index, states in zip(
                batch, block_inputs(self.adapter, lines, batch, self.block), strict=True
            ):
                found[index] = states.clone()  # a view would keep the whole padded batch alive
        return Texts(encoded, found)

    def seen(self, texts: Texts, lessons: Lessons, chosen: Sequence[int]) -> Lessons:
        """Some examples with the student's own states in the place of bare ones."""
        each = max(1, len(texts.encoded.reads))
        lines = [texts.entering[line] for i in chosen for line in range(i * each, (i + 1) * each)]
        states = states_from_block(self.adapter, texts.encoded, chosen, self.block, lines).float()
        part = lessons.part(list(chosen))
        return replace(part, bare=states, others=others(self.student.task, states))

    @torch.no_grad()
    def answers(self, encoded: EncodedSet, lessons: Lessons) -> Answers:
        """How it does."""
        parts = []
        for start in range(0, len(lessons), _TOGETHER):
            end = min(start + _TOGETHER, len(lessons))
            texts = self.texts(encoded.part(start, end))
            chosen = lessons.part(list(range(start, end)))
            parts.append(self.seen(texts, chosen, range(end - start)))
        return self.student.answers(joined(parts))

    def changes(self) -> dict[str, LowRank]:
        """The changes of the blocks' linear layers, by their names in the backbone's model."""
        values = {name: value.detach() for name, value in self.parameters.items()}
        layers = {name.removesuffix(".A") for name in values if name.endswith(".A")}
        return {
            layer.removeprefix("lora."): LowRank(values[f"{layer}.A"], values[f"{layer}.B"])
            for layer in sorted(layers)
        }


def how_many_fit(encoded: EncodedSet, token_bytes: int, limit: int = _KEPT_BYTES) -> int:
    """How many of the first examples take no more than ``limit`` bytes, at so many per token; at least one."""
    sizes = (sum(map(len, encoded.lines([index])[0])) for index in range(len(encoded)))
    totals = itertools.accumulate(token_bytes * size for size in sizes)
    return max(1, sum(total <= limit for total in totals))


def deepen(
    backbone: Backbone,
    student: Student,
    encoded: EncodedSet,
    lessons: Lessons,
    seed: int,
    report: Report,
) -> DeepStudent | None:
    """Let the last blocks of a bare backbone learn with a student; None where its family cannot start at a block.

    ``encoded``: the examples of ``lessons``. A LoRA stays attached to the backbone.
    """
    rank = len(student.down)
    method = MethodConfig(kind="lora", lora_rank=rank, lora_alpha=float(rank))
    adapter = attach(backbone, method, 0)
    adapter.load(initial_tensors(adapter.shapes, seed))
    block = max(1, backbone.layers - BLOCKS)
    if not can_start_at(adapter, encoded, block):
        return None
    deep = DeepStudent(adapter, student, block)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(False)
    for parameter in deep.parameters.values():
        parameter.requires_grad_(True)
    fitting = how_many_fit(encoded, 4 * backbone.hidden)
    of = "" if fitting == len(encoded) else f" of {len(encoded)} (no more fit into memory)"
    report(f"reading {fitting} texts{of} up to block {block + 1} of {backbone.layers}")
    encoded, lessons = encoded.part(0, fitting), lessons.part(list(range(fitting)))
    texts = deep.texts(encoded)
    learned, held = lessons.split(seed)

    def loss(chosen: Sequence[int]) -> Tensor:
        return divergence(student, deep.seen(texts, lessons, chosen))

    @torch.no_grad()
    def on_held() -> float:
        parts = [held[start : start + _TOGETHER] for start in range(0, len(held), _TOGETHER)]
        return sum(float(loss(part)) * len(part) for part in parts) / len(held)

    trained = [*deep.parameters.values(), student.down, student.up]
    size = max(1, _STATES * len(lessons) // len(lessons.bare))
    fit(trained, Loop(_STEPS, _RATE, size), loss, on_held, learned, seed, report)
    return deep
