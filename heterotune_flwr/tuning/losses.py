"""What a client minimises: a sum of loss terms, each with rows of its own and a way to draw some for a step."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.plugins import load_plugin
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.states import Rows
from heterotune_flwr.tuning.task import Task


class LossTerm(Protocol):
    """One term of the loss. Of the first term of a training the values are reported."""

    @property
    def rows(self) -> Rows:
        """The rows it is computed on; a step's memory is measured on the longest."""

    def __len__(self) -> int:
        """Count what it draws from; without any it is left out."""

    def draw(self, batch: int, rng: np.random.Generator) -> list[int]:
        """Indices in ``rows`` for the next step, where a step is on ``batch`` examples."""

    def loss(self, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Give what a part of a drawn batch adds to the batch's loss: a scalar, often a sum by ``len(batch)``."""


class Examples:
    """The client's own examples, for one training: all come once before any comes again, in an order of ``rng``.

    Parameters
    ----------
    rows
        All examples.
    prior
        Their log label frequencies (:meth:`.task.Task.log_prior`), discounted by the loss.
    most
        What a single loss counts for at most in the loss that is reported, in nats; it is trained on as it is.
    aside
        So many, drawn by ``rng``, are left out.

    """

    def __init__(
        self, rows: Rows, prior: Tensor | None = None, most: float = math.inf, aside: int = 0
    ) -> None:
        self.rows = rows
        self.aside = aside
        #: The batch of this step.
        self.drawn: list[int] = []
        self._prior, self._most = prior, most
        self._used: Sequence[int] = range(len(rows))
        self._queue: list[int] = []
        self._begun = False

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, batch: int, rng: np.random.Generator) -> list[int]:
        """Next ``batch`` different examples, or all where they are fewer."""
        if self.aside and not self._begun:
            self._used = rng.permutation(len(self.rows))[self.aside :].tolist()
        self._begun = True
        size = min(batch, len(self._used))
        if len(self._queue) < size:
            rest = set(self._queue)
            self._queue += [i for i in rng.permutation(len(self._used)).tolist() if i not in rest]
        self.drawn = [self._used[position] for position in self._queue[:size]]
        self._queue = self._queue[size:]
        return self.drawn

    def loss(self, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
        """Mean over the rows of a batch: over examples, or over their answers' tokens."""
        return self.measure(task, part, batch)[0]

    def measure(
        self, task: Task, part: Sequence[int], batch: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, share of right examples, and loss with no single one above ``most``; parts add up to a batch's."""
        states, targets, owners = self.rows.rows(part)
        losses, correct = task.losses(states, targets, self._prior)
        count = self.rows.count(batch)
        right = examples_correct(correct, owners, len(part)).sum() / len(batch)
        return losses.sum() / count, right, losses.detach().clamp(max=self._most).sum() / count


def examples_correct(correct: Tensor, owners: Tensor, count: int) -> Tensor:
    """Whether *all* rows of each of ``count`` examples are correct (bool ``count``)."""
    wrong = torch.zeros(count, dtype=torch.long, device=correct.device)
    wrong.index_add_(0, owners, (~correct).long())
    return wrong == 0


class OnExamples:
    """Base of a further loss on a client's own examples: each step it has those that are drawn anyway.

    So what a node's owner leaves out of a step stays out of this loss too.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    @property
    def rows(self) -> Rows:
        """See :class:`LossTerm`."""
        return self.examples.rows

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, batch: int, rng: np.random.Generator) -> list[int]:
        """Draw the own examples of this step."""
        return self.examples.drawn

    @abstractmethod
    def loss(self, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
        """See :class:`LossTerm`."""


def installed_losses(
    wanted: Mapping[str, Mapping[str, Any]], examples: Examples, adapter: AttachedAdapter
) -> list[LossTerm]:
    """The terms of ``train.losses``: name of an entry point -> options, made as ``make(examples, adapter, **options)``.

    Raises
    ------
    ConfigError
        No installed package has one of that name, or it does not take these options.

    """
    found: list[LossTerm] = []
    for name, options in wanted.items():
        make = load_plugin("losses", name)
        try:
            inspect.signature(make).bind(examples, adapter, **options)
        except TypeError as error:
            raise ConfigError(
                f"train.losses.{name}: {error}", f"train.losses: {name} does not take these options"
            ) from error
        found.append(make(examples, adapter, **options))
    return found
