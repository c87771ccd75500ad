"""A LoRA on the unembedding that says what a trained model says, as far as a linear function can.

What a trained last slot changes depends on the bare final state ``h`` alone. The student adds a linear function of
``h`` of low rank: to the labels' logits, or for open text to the state (``W (h + G Q h)``, so that ``W G Q`` is the
change of the unembedding W). It begins at a least-squares fit of what the teacher adds. Adam then lowers the
Kullback-Leibler divergence from the teacher's distributions at answer positions. No pass through the backbone is
needed: the states are kept. A tenth of the examples is held out, and what is best there is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.data.label_trie import LabelTrie
from heterotune_flwr.dema.access import active_adapter, slot_layers
from heterotune_flwr.export.lessons import Answers, Lessons, answers, vocabulary_logits
from heterotune_flwr.export.low_rank import LowRank, sparse_rows
from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.task import Task

Report = Callable[[str], None]

#: Rank of a distilled LoRA where the user says nothing.
RANK = 32
_STEPS = 300
_BATCH = 64
_RATE = 0.002
_RIDGE = 1e-3
#: How far labels are to stand above all other tokens, in nats.
_MARGIN = 4.0
#: Steps between two looks at what is held out.
_LOOK = 25
#: Seconds between two lines of progress, at least.
_PATIENCE = 4.0


@dataclass(frozen=True)
class Fidelity:
    """How well a LoRA stands for the model it was made from, on examples that neither was trained on.

    Attributes
    ----------
    gain_kept
        Share of the model's gain over the bare one, in mean loss, that the LoRA keeps; None where there is no gain.
    agreement
        Share of answers (labels; for open text tokens) that are the same.
    loss, accuracy
        By ``bare``, ``model`` and ``lora``.
    examples
        On how many.

    """

    gain_kept: float | None
    agreement: float
    loss: dict[str, float]
    accuracy: dict[str, float]
    examples: int


class Student:
    """A linear function of low rank of bare final states, in place of a trained slot.

    ``reads`` (f x d) are the directions of the state that it sees, with a spread of 1; ``down`` (k x f), ``up``
    (out x k): logits of the label trie's columns, or, for open text, states.
    """

    def __init__(self, task: Task, reads: Tensor, down: Tensor, up: Tensor) -> None:
        self.task = task
        self.reads = reads
        self.down = down.clone().requires_grad_()
        self.up = up.clone().requires_grad_()

    def changed(self) -> Task:
        """The task with the student in its label rows."""
        rows, _ = self.task.label_rows()
        return replace(self.task, rows_weight=rows + self.up @ self.down @ self.reads)

    def states(self, bare: Tensor) -> Tensor:
        """States with the student's change, for open text."""
        return bare + bare @ self.reads.T @ self.down.T @ self.up.T

    def answers(self, lessons: Lessons) -> Answers:
        """How it does."""
        if self.task.kind == "labels":
            return answers(self.changed(), lessons, lessons.bare, None)
        return answers(self.task, lessons, self.states(lessons.bare), None)

    @torch.no_grad()
    def change(self) -> LowRank:
        """The change of the unembedding that it is."""
        weight = self.task.backbone.model.get_output_embeddings().weight
        down = (self.down @ self.reads).detach()
        if self.task.trie is not None and self.task.kind == "labels":
            return LowRank(down, sparse_rows(self.up.detach(), self.task.trie.tokens, len(weight)))
        return LowRank(down, weight.float() @ self.up.detach())


def distil(
    adapter: AttachedAdapter,
    task: Task,
    lessons: Lessons,
    rank: int = RANK,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Student:
    """Fit a student of at most ``rank`` to what an attached adapter does on examples; progress goes to ``report``."""
    learned, held = lessons.split(seed)
    train, check = lessons.part(learned), lessons.part(held)
    reads = _directions(adapter, train.bare)
    student = Student(task, reads, *_least_squares(task, train, reads, rank))
    fit(
        [student.down, student.up],
        Loop(_STEPS, _RATE, _examples_at_a_time(task, train)),
        lambda chosen: divergence(student, train.part(chosen)),
        lambda: _mean(student, check),
        range(len(train)),
        seed,
        report,
    )
    return student


def fidelity(task: Task, lessons: Lessons, student: Answers) -> Fidelity:
    """How a student's answers compare with the teacher's and the bare model's."""
    bare = answers(task, lessons, lessons.bare, None)
    model = answers(task, lessons, lessons.taught, lessons.offsets)
    gain = bare.loss - model.loss
    named = {"bare": bare, "model": model, "lora": student}
    return Fidelity(
        gain_kept=(bare.loss - student.loss) / gain if gain > 0 else None,
        agreement=float((student.said == model.said).float().mean()),
        loss={name: found.loss for name, found in named.items()},
        accuracy={name: found.accuracy for name, found in named.items()},
        examples=len(lessons),
    )


@torch.no_grad()
def _directions(adapter: AttachedAdapter, states: Tensor) -> Tensor:
    """Directions of the state that a student sees (f x d), of spread 1 and uncorrelated on ``states`` (R x d).

    A last slot sees ``D h``; with it goes the direction in which ``h`` hardly varies, which stands for a constant.
    Where more than the last slot is trained, or channels read more, it is all of ``h``.
    """
    method = adapter.method
    seen = torch.eye(states.shape[1], device=states.device)
    moments = states.T @ states / len(states)
    ridge = _RIDGE * moments.diagonal().mean()
    if method.kind == "dema" and method.slots == 1 and not method.core_rank and not method.views:
        down = _map_of(adapter)
        constant = torch.linalg.solve(moments + ridge * seen, states.mean(0))
        seen = torch.cat([down, constant[None]]) if len(down) < len(seen) else seen
    spread = seen @ moments @ seen.T
    scale = spread.diagonal().clamp(min=1e-12).rsqrt()
    values, vectors = torch.linalg.eigh(spread * scale[:, None] * scale)
    factor = vectors * (values.clamp(min=0) + _RIDGE * values.max()).rsqrt()
    found: Tensor = factor.T @ (scale[:, None] * seen)
    return found


def _map_of(adapter: AttachedAdapter) -> Tensor:
    """``D`` of the last slot (r x d)."""
    layer: Any = slot_layers(adapter.model)[-1]
    found: Tensor = layer.dema_maps[active_adapter(adapter.model)].down_weight
    return found.float()


@torch.no_grad()
def _least_squares(task: Task, lessons: Lessons, reads: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (k x f, out x k) of the linear fit of what the teacher adds: to label rows, or to states."""
    added = lessons.taught - lessons.bare
    if task.kind == "labels":
        found = torch.cat(
            [
                _solved(lessons.bare[node :: len(parts)] @ reads.T, part)
                for parts in [_added_to_labels(task, lessons)]
                for node, part in enumerate(parts)
            ],
            dim=1,
        )
    else:
        found = _solved(lessons.bare @ reads.T, added)
    left, values, right = torch.linalg.svd(found, full_matrices=False)
    k = min(rank, len(values))
    root = values[:k].sqrt()
    return (left[:, :k] * root).T.contiguous(), right[:k].T * root


def _solved(seen: Tensor, wanted: Tensor) -> Tensor:
    """``X`` (f x out) of least squares ``seen X = wanted``, with a small ridge."""
    moments = seen.T @ seen
    ridge = _RIDGE * moments.diagonal().mean() * torch.eye(len(moments), device=seen.device)
    found: Tensor = torch.linalg.solve(moments + ridge, seen.T @ wanted)
    return found


def _added_to_labels(task: Task, lessons: Lessons) -> list[Tensor]:
    """For every node of the trie what its children's logits (n x children) are to get.

    What the teacher adds, and the same for all of them, so that they stand above all other tokens.
    """
    assert task.trie is not None
    assert lessons.others is not None
    rows, bias = task.label_rows()
    parts = []
    nodes = zip(
        torch.split(rows, task.trie.sizes),
        [None] * len(task.trie.nodes) if bias is None else torch.split(bias, task.trie.sizes),
        strict=True,
    )
    for number, (row, base) in enumerate(nodes):
        taught = lessons.taught[number :: len(task.trie.nodes)]
        bare = lessons.bare[number :: len(task.trie.nodes)]
        logits = functional.linear(taught, row, base)
        if number == 0 and lessons.offsets is not None:
            logits = logits + _at_root(task.trie, lessons.offsets) / task.scaling.scale
        inside = task.scaling(logits).logsumexp(-1)
        lift = (lessons.others[:, number] - inside + _MARGIN) / task.scaling.scale
        parts.append(logits - functional.linear(bare, row, base) + lift[:, None])
    return parts


def _at_root(trie: LabelTrie, offsets: Tensor) -> Tensor:
    """What labels get (n x C), by their first column; those that share one get the logarithm of the mean."""
    columns = [
        [label for label, way in enumerate(trie.ways) if way[0] == column]
        for column in range(trie.sizes[0])
    ]
    return torch.stack([offsets[:, c].logsumexp(-1) - math.log(len(c)) for c in columns], dim=1)


def divergence(student: Student, lessons: Lessons) -> Tensor:
    """What a student is to lower: how far it is from its teacher, in nats."""
    return (_label_loss if student.task.kind == "labels" else _token_loss)(student, lessons)


def _label_loss(student: Student, lessons: Lessons) -> Tensor:
    """Divergence from the teacher's distribution over labels, and what the student gives to other tokens.

    The second part makes a model that writes freely write a label.
    """
    task = student.task
    assert task.trie is not None
    with torch.no_grad():
        taught = task.label_logits(lessons.taught)
        taught = taught if lessons.offsets is None else taught + lessons.offsets
        wanted = taught.softmax(-1)
    changed = student.changed()
    own = changed.label_logits(lessons.bare).log_softmax(-1)
    total = functional.kl_div(own, wanted, reduction="batchmean")
    assert lessons.others is not None
    rows, bias = changed.label_rows()
    biases = [None] * len(task.trie.nodes) if bias is None else torch.split(bias, task.trie.sizes)
    for number, (row, base) in enumerate(
        zip(torch.split(rows, task.trie.sizes), biases, strict=True)
    ):
        states = lessons.bare[number :: len(task.trie.nodes)]
        inside = task.scaling(functional.linear(states, row, base)).logsumexp(-1)
        total = total + functional.softplus(lessons.others[:, number] - inside).mean()
    return total


def _token_loss(student: Student, lessons: Lessons) -> Tensor:
    """Divergence from the teacher's distribution over the vocabulary, per position."""
    with torch.no_grad():
        wanted = vocabulary_logits(student.task, lessons.taught).log_softmax(-1)
    own = vocabulary_logits(student.task, student.states(lessons.bare)).log_softmax(-1)
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Loop:
    """Steps, Adam's rate, and examples a step."""

    steps: int
    rate: float
    examples: int


def fit(
    parameters: Sequence[Tensor],
    loop: Loop,
    loss: Callable[[list[int]], Tensor],
    held: Callable[[], float],
    examples: Sequence[int],
    seed: int,
    report: Report,
) -> None:
    """Adam from where parameters are; in the end they hold what was best on what is ``held`` out.

    ``loss``: of some of the ``examples``, by their numbers in rising order.
    """
    optimizer = torch.optim.Adam(parameters, lr=loop.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, loop.steps)
    rng = generator(seed, "distil.batches")
    best, kept = held(), [value.detach().clone() for value in parameters]
    began = told = time.monotonic()
    for step in range(1, loop.steps + 1):
        size = min(loop.examples, len(examples))
        value = loss(sorted(rng.choice(examples, size=size, replace=False).tolist()))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % _LOOK == 0:
            now = held()
            if now < best:
                best, kept = now, [value.detach().clone() for value in parameters]
            if (now_at := time.monotonic()) - told > _PATIENCE:
                told, left = now_at, (now_at - began) / step * (loop.steps - step)
                report(
                    f"distilling: step {step} of {loop.steps}, divergence {best:.4f} nats, about {left:.0f} s to go"
                )
    with torch.no_grad():
        for parameter, found in zip(parameters, kept, strict=True):
            parameter.copy_(found)


def _examples_at_a_time(task: Task, lessons: Lessons) -> int:
    """Of open text so many that their positions, each with the whole vocabulary's logits, are as many as labels'."""
    if task.kind == "labels":
        return _BATCH
    return max(1, _BATCH * len(lessons) // len(lessons.bare))


@torch.no_grad()
def _mean(student: Student, lessons: Lessons) -> float:
    """Mean divergence on all examples, some at a time."""
    size = _examples_at_a_time(student.task, lessons)
    total, rows = 0.0, 0
    for start in range(0, len(lessons), size):
        part = lessons.part(list(range(start, min(start + size, len(lessons)))))
        total += float(divergence(student, part)) * len(part.targets)
        rows += len(part.targets)
    return total / rows
