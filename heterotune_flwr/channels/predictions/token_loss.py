"""Fitting and predicting distributions over symbols at the positions of public answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.channels.predictions.loss import BATCH_TOKENS
from heterotune_flwr.channels.predictions.token_record import TOP, Floats, Ints
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task


@dataclass(frozen=True)
class TokenDistillation:
    """A loss on public answers, token by token (:class:`.losses.LossTerm`).

    Attributes
    ----------
    rows
        The answers.
    tokens, chances
        At every position of all of them (``P x 8``) ids and their probabilities: the federation's where tokenizers
        stand one to one, elsewhere the answer's own token (sequence-level distillation, arXiv 1606.07947).
    starts
        Where each answer's positions begin, and behind the last one ``P``.
    weight, batch
        As of :class:`.loss.Distillation`.

    """

    rows: Rows
    tokens: Tensor
    chances: Tensor
    starts: Sequence[int]
    weight: float
    batch: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, batch: int, rng: np.random.Generator) -> list[int]:
        """See :class:`.losses.LossTerm`."""
        size = min(self.batch or batch, len(self))
        return [int(index) for index in rng.choice(len(self), size=size, replace=False)]

    def loss(self, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Weighted cross-entropy of some answers, each the mean over its positions, by the batch's size."""
        states, _, owners = self.rows.rows(part)
        places = [p for index in part for p in range(self.starts[index], self.starts[index + 1])]
        losses = torch.cat(
            [
                checkpoint(_soft_losses, task, *chunk, use_reentrant=False)
                for chunk in _chunks(task, states, self.tokens[places], self.chances[places])
            ]
        )
        total = torch.zeros(len(part), device=losses.device).index_add(0, owners, losses)
        each = total / torch.bincount(owners, minlength=len(part))
        return self.weight * each.sum() / len(batch)


def _chunks(task: Task, states: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows in parts whose logits stay small."""
    parts = task.chunks(states, states)
    sizes = [len(part) for part, _ in parts]
    split = [torch.split(other, sizes) for other in others]
    return [(part, *rest) for (part, _), *rest in zip(parts, *split, strict=True)]


def _logs(task: Task, states: Tensor) -> Tensor:
    """Log-probabilities over the vocabulary (float32 ``N x V``)."""
    head = task.backbone.model.get_output_embeddings()
    logs: Tensor = task.scaling(head(states.contiguous()).float()).log_softmax(-1)
    return logs


def _soft_losses(task: Task, states: Tensor, tokens: Tensor, chances: Tensor) -> Tensor:
    return -(chances * _logs(task, states).gather(1, tokens)).sum(-1)


@dataclass(frozen=True)
class OwnSymbols:
    """A client's reading of symbols.

    ``ids`` of symbols, ``numbers`` of ids (-1: it is none), ``first``: the same for an answer's first token.
    Answers begin with a space in one form and without in another; their first pieces count as those with one.
    """

    ids: Ints
    numbers: Ints
    first: Ints

    @cached_property
    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """``numbers`` and ``first``."""
        return torch.from_numpy(self.numbers), torch.from_numpy(self.first)


@torch.no_grad()
def predict_tokens(
    task: Task, rows: Rows, starts: Sequence[int], own: OwnSymbols
) -> tuple[Ints, Floats]:
    """The likeliest symbols at every position of all answers, and their chances (``P x 8`` each)."""
    numbers = np.zeros((starts[-1], TOP), np.int64)
    chances = np.zeros((starts[-1], TOP))
    tables = [table.to(task.backbone.device) for table in own.as_tensors]
    for batch in batches_by_length([rows.length(n) for n in range(len(rows))], BATCH_TOKENS):
        states, _, _ = rows.rows(batch)
        places = np.array([p for n in batch for p in range(starts[n], starts[n + 1])])
        begins = np.isin(places, [starts[n] for n in batch])
        is_first = torch.from_numpy(begins).to(states.device)
        done = 0
        for part, here in _chunks(task, states, is_first):
            logs = _logs(task, part)
            table = torch.where(here[:, None], tables[1], tables[0])[:, : logs.shape[1]]
            logs = logs[:, : table.shape[1]].masked_fill(table < 0, -torch.inf)
            found = logs.topk(min(TOP, logs.shape[1]), dim=1)
            rows_of = places[done : done + len(part)]
            width = found.indices.shape[1]
            numbers[rows_of, :width] = table.gather(1, found.indices).clamp(min=0).cpu().numpy()
            chances[rows_of, :width] = found.values.double().exp().cpu().numpy()
            done += len(part)
    return numbers, chances
