"""What a model says on some examples, at the positions where answers are read: what a LoRA is distilled from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.forward import first_block
from heterotune_flwr.tuning.frozen_states import bare_states
from heterotune_flwr.tuning.losses import examples_correct
from heterotune_flwr.tuning.states import FullRows
from heterotune_flwr.tuning.task import EncodedSet, Task

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Lessons:
    """N examples in the bare backbone and in a trained one, the *teacher*.

    Attributes
    ----------
    bare, taught
        Final states ``R x d`` (float32) at all positions, example by example.
    targets, owners
        What is right at every position, and whose position it is; of labels one for each example.
    offsets
        What the teacher adds to the labels' logits (``N x C``), None for nothing.
    others
        Of labels: at every node of their trie the log of the summed exponentials of all tokens that are none of its
        children (``N x nodes``).

    """

    bare: Tensor
    taught: Tensor
    targets: Tensor
    owners: Tensor
    offsets: Tensor | None
    others: Tensor | None

    def __len__(self) -> int:
        return int(self.owners.max()) + 1 if len(self.owners) else 0

    def split(self, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of the examples that a student learns from, and of a tenth that is held out (both rising)."""
        order = generator(seed, "distil.held").permutation(len(self)).tolist()
        held = len(self) // 10
        return sorted(order[held:]), sorted(order[:held] or order)

    def part(self, examples: list[int]) -> Lessons:
        """Those of some examples alone, in rising order."""
        chosen = torch.zeros(len(self), dtype=torch.bool, device=self.owners.device)
        chosen[examples] = True
        targets = chosen[self.owners]
        states = targets.repeat_interleave(len(self.bare) // max(len(self.owners), 1))
        number = chosen.cumsum(0) - 1
        return Lessons(
            self.bare[states],
            self.taught[states],
            self.targets[targets],
            number[self.owners[targets]],
            None if self.offsets is None else self.offsets[chosen],
            None if self.others is None else self.others[chosen],
        )


def joined(parts: Sequence[Lessons]) -> Lessons:
    """Lessons of several lists of examples as those of one list."""
    starts = itertools.accumulate((len(part) for part in parts), initial=0)
    return Lessons(
        torch.cat([part.bare for part in parts]),
        torch.cat([part.taught for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.owners + start for part, start in zip(parts, starts, strict=False)]),
        _all([part.offsets for part in parts]),
        _all([part.others for part in parts]),
    )


def _all(tables: Sequence[Tensor | None]) -> Tensor | None:
    there = [table for table in tables if table is not None]
    return torch.cat(there) if there else None


@torch.no_grad()
def read_lessons(
    adapter: AttachedAdapter, task: Task, encoded: EncodedSet, offsets: Tensor | None
) -> Lessons:
    """What an attached, loaded adapter makes of examples (at least one); nothing is kept on disk."""
    device = adapter.backbone.device
    counts = torch.tensor([len(targets) for targets in encoded.targets], device=device)
    bare = bare_states(adapter, encoded, cache=False)
    if first_block(adapter) is None:  # what it trained reads the bare final state alone
        taught = adapter.last_slot(bare)
    else:
        rows = FullRows(adapter, encoded)
        starts = range(0, len(encoded), _BATCH)
        places = [range(start, min(start + _BATCH, len(encoded))) for start in starts]
        taught = torch.cat([rows.rows(list(chosen))[0] for chosen in places])
    return Lessons(
        bare.float(),
        taught.float(),
        torch.tensor([one for targets in encoded.targets for one in targets], device=device),
        torch.arange(len(encoded), device=device).repeat_interleave(counts),
        offsets,
        others(task, bare),
    )


def others(task: Task, bare: Tensor) -> Tensor | None:
    """See :class:`Lessons`; None of open text."""
    if task.kind != "labels" or task.trie is None:
        return None
    nodes = task.trie.nodes
    found = []
    for number, node in enumerate(nodes):
        states = bare[number :: len(nodes)]
        parts = []
        for rows, _ in task.chunks(states, torch.zeros(len(states))):
            logits = vocabulary_logits(task, rows)
            logits[:, list(node.children)] = float("-inf")
            parts.append(logits.logsumexp(-1))
        found.append(torch.cat(parts))
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Answers:
    """How one model does on examples: mean loss, share of right examples, and its answer at every position."""

    loss: float
    accuracy: float
    said: Tensor


@torch.no_grad()
def answers(task: Task, lessons: Lessons, states: Tensor, offsets: Tensor | None) -> Answers:
    """Measure states (R x d) as ``heterotune`` does everywhere: labels by their whole strings, or every token."""
    if task.kind == "labels":
        logits = task.label_logits(states)
        logits = logits if offsets is None else logits + offsets
        losses, said = functional.cross_entropy(logits, lessons.targets, reduction="none"), logits
    else:
        parts = [
            (functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1))
            for rows, wanted in task.chunks(states, lessons.targets)
            for logits in [vocabulary_logits(task, rows)]
        ]
        losses = torch.cat([loss for loss, _ in parts])
        chosen = torch.cat([best for _, best in parts])
        right = examples_correct(chosen == lessons.targets, lessons.owners, len(lessons))
        return Answers(float(losses.mean()), float(right.float().mean()), chosen)
    chosen = said.argmax(-1)
    return Answers(float(losses.mean()), float((chosen == lessons.targets).float().mean()), chosen)


def vocabulary_logits(task: Task, states: Tensor) -> Tensor:
    """Logits over the vocabulary (float32 ``N x V``) of final states."""
    head = task.backbone.model.get_output_embeddings()
    weight = head.weight
    return task.scaling(functional.linear(states.to(weight.dtype), weight, head.bias).float())
