"""A lesson on a client: which texts it is about, what the client fits, what it answers (see :mod:`.consensus`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from heterotune_flwr.config.schema import AlignmentConfig, Config
from heterotune_flwr.data.examples import Example
from heterotune_flwr.dema.anchors import anchor_digest, load_anchors, round_anchors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.consensus import Lesson, as_probabilities
from heterotune_flwr.federation.encodings import encodings
from heterotune_flwr.federation.identity import Identity
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.distill import Distillation, predict
from heterotune_flwr.tuning.states import Rows, make_rows
from heterotune_flwr.tuning.task import EncodedSet, Task


@functools.lru_cache(maxsize=2)
def _texts(anchors: str, count: int) -> list[str]:
    return load_anchors(AlignmentConfig(anchors=anchors, count=count))


def _encoded(lesson: Lesson, alignment: AlignmentConfig, task: Task) -> EncodedSet:
    """Token ids of the anchors; ConfigError where this client's are not the server's."""
    texts = _texts(alignment.anchors, alignment.count)
    if anchor_digest(texts) != lesson.digest:
        raise ConfigError(
            f"the anchors {alignment.anchors} here are not those of the server; they must be the same texts in the "
            "same order"
        )
    assert task.labels is not None
    unknown = task.labels[0]  # an anchor has no label; encoding wants one
    return encodings.encoded(
        task, ("anchors", lesson.digest), lambda: [Example(text, unknown) for text in texts]
    )


@dataclass(frozen=True)
class AnchorWork:
    """One client's work on the anchors in one round; ``rows`` are those of the whole pool."""

    lesson: Lesson
    task: Task
    rows: Rows
    seed: int

    @classmethod
    def of(
        cls,
        lesson: Lesson | None,
        identity: Identity,
        config: Config,
        task: Task,
        adapter: AttachedAdapter,
        seed: int,
    ) -> AnchorWork | None:
        """Prepare a lesson; None where there is none.

        Raises
        ------
        ConfigError
            The task has no closed label set, or this client reads other anchors than the server.

        """
        if lesson is None:
            return None
        if task.kind != "labels":
            raise ConfigError(
                "predictions on anchors need a closed label set (data.labels, train.loss)"
            )
        alignment = replace(identity.alignment(config), count=lesson.pool)
        encoded = _encoded(lesson, alignment, task)
        return cls(lesson, task, make_rows(adapter, encoded, config.train.cache_states), seed)

    def _chosen(self, round: int) -> list[int]:
        return round_anchors(self.lesson.pool, self.lesson.count, self.seed, round)

    def distillation(self, round: int) -> Distillation | None:
        """What to fit in a round; None where nobody has predicted on its anchors (ExchangeError: other labels)."""
        lesson = self.lesson
        if lesson.targets is None or not lesson.weight:
            return None
        values = as_probabilities(lesson.targets, lesson.count, len(self.task.labels or ()))
        targets = torch.from_numpy(values).to(self.task.backbone.device)
        return Distillation(self.rows, self._chosen(round), targets, lesson.weight, lesson.batch)

    def predictions(self, round: int) -> NDArray[np.float32]:
        """What the model, with the values it now holds, says of a round's anchors (``count x C``)."""
        return predict(self.task, self.rows, self._chosen(round))
