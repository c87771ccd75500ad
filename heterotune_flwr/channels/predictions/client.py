"""A lesson on a client: which texts it is about, what the client fits, what it says (see :mod:`.record`)."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors, round_anchors
from heterotune_flwr.channels.answers.leak_filter import repeating
from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.predictions.record import (
    LONGEST_ANSWER,
    DistillationRequest,
    as_probabilities,
)
from heterotune_flwr.channels.statistics.client import classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.client.encodings import encodings
from heterotune_flwr.client.identity import Identity
from heterotune_flwr.data.examples import Example
from heterotune_flwr.dema.bank import generator
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.schema import AlignmentConfig, Config
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.generation import answer_prompts, draw_answers
from heterotune_flwr.tuning.states import Rows, make_rows
from heterotune_flwr.tuning.task import EncodedSet, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What a client says of a round's anchors: label probabilities ``n x C``, or answers and sureness ``n x 1``."""

    predictions: NDArray[np.float32] | None = None
    answers: list[str] | None = None


class AnchorWork(Protocol):
    """One client's work on the anchors in one round."""

    def distillation(self, round: int) -> Distillation | None:
        """What to fit in a round; None where there is nothing."""

    def predict(self, round: int) -> Said:
        """What the model, with the values it now holds, says of a round's anchors."""


@functools.lru_cache(maxsize=4)
def anchor_texts(anchors: str, count: int) -> list[str]:
    """As :func:`...federation.load_anchors`, read once per process."""
    return load_anchors(AlignmentConfig(anchors=anchors, count=count))


def _known_texts(lesson: DistillationRequest, alignment: AlignmentConfig) -> list[str]:
    """The anchors; ConfigError where this client's are not the server's."""
    texts = anchor_texts(alignment.anchors, lesson.extent)
    if len(texts) < lesson.extent or anchor_digest(texts) != lesson.digest:
        raise ConfigError.plain(
            "the anchors here are not those of the server; they must be the same texts in the same order "
            "(alignment.anchors, anchors in a node's settings)"
        )
    return texts


def _drawn(lesson: DistillationRequest, count: int, seed: int, round: int) -> list[int]:
    """The anchors of a round: out of the pool, or all of the list where they are more."""
    return round_anchors(max(lesson.pool, count), count, seed, round)


def _encoded(lesson: DistillationRequest, texts: list[str], task: Task) -> EncodedSet:
    assert task.labels is not None
    unknown = task.labels[0]  # an anchor has no label; encoding wants one
    return encodings.encoded(
        task, ("anchors", lesson.digest), lambda: [Example(text, unknown) for text in texts]
    )


def anchor_work(
    lesson: DistillationRequest | None,
    identity: Identity,
    config: Config,
    task: Task,
    adapter: AttachedAdapter,
    seed: int,
    discriminant: LinearClassifier | None = None,
) -> AnchorWork | None:
    """Prepare a lesson; None where there is none. ``discriminant`` has its say in what the client predicts, and some of
    it in what it fits to the others' predictions.

    Raises
    ------
    ConfigError
        The lesson is in words and the label set closed, or the other way round; or this client reads other anchors than
        the server.

    """
    if lesson is None:
        return None
    if lesson.words != (task.kind == "tokens"):
        raise ConfigError.plain(
            "answers on anchors need an open-text task, predictions a closed label set (data.labels, train.loss)"
        )
    texts = _known_texts(lesson, identity.alignment(config))
    cache = config.train.cache_states
    if lesson.words:
        return _Answering(lesson, task, adapter, texts, identity, seed, cache)
    encoded = _encoded(lesson, texts, task)
    offsets = classifier_logits(discriminant, adapter, task, encoded, cache)
    rows = make_rows(adapter, encoded, cache, offsets=offsets)
    return _Predicting(
        lesson, task, rows, seed, discriminant.distill_share if discriminant else 1.0
    )


@dataclass(frozen=True)
class _Predicting:
    """Label probabilities of a closed set; ``rows`` are those of the whole pool, ``distill_share`` as of the
    discriminant.
    """

    lesson: DistillationRequest
    task: Task
    rows: Rows
    seed: int
    distill_share: float

    def distillation(self, round: int) -> Distillation | None:
        """Fit the federation's mean; None where nobody has predicted (ExchangeError: other labels)."""
        lesson = self.lesson
        if lesson.targets is None or lesson.is_empty:
            return None
        values = as_probabilities(lesson.targets, lesson.count, len(self.task.labels or ()))
        targets = torch.from_numpy(values).to(self.task.backbone.device)
        chosen = _drawn(lesson, lesson.count, self.seed, round)
        return Distillation(
            self.rows,
            chosen,
            targets,
            lesson.weight,
            lesson.batch,
            lesson.informativeness_power,
            self.distill_share,
        )

    def predict(self, round: int) -> Said:
        """Predict."""
        lesson = self.lesson
        if not lesson.wanted:
            return Said()
        chosen = _drawn(lesson, lesson.wanted, self.seed, round)
        return Said(predict(self.task, self.rows, chosen))


@dataclass(frozen=True)
class _Answering:
    """Answers in words."""

    lesson: DistillationRequest
    task: Task
    adapter: AttachedAdapter
    texts: list[str]
    identity: Identity
    seed: int
    cache: bool

    def _chosen(self, count: int, round: int) -> list[str]:
        chosen = _drawn(self.lesson, count, self.seed, round)
        return [self.texts[index] for index in chosen]

    def distillation(self, round: int) -> Distillation | None:
        """Fit the drawn answers, token by token."""
        lesson = self.lesson
        if lesson.answers is None or lesson.is_empty:
            return None
        encoded = EncodedSet([], [], [])
        texts = self._chosen(lesson.count, round)
        for text, answer in zip(texts, lesson.answers, strict=True):
            if (one := self._encode(text, answer)) is not None:
                encoded.inputs.extend(one.inputs)
                encoded.positions.extend(one.positions)
                encoded.targets.extend(one.targets)
        if not len(encoded):
            return None
        rows = make_rows(self.adapter, encoded, self.cache, on_disk=False)
        return Distillation(rows, range(len(rows)), None, lesson.weight, lesson.batch)

    def _encode(self, text: str, answer: str) -> EncodedSet | None:
        """One answer; None for what no client can have drawn: nothing, too many tokens, an end in its midst."""
        if not answer:
            return None
        try:
            one = self.task.encode([Example(text, answer)])
        except DataError:  # no room for a prompt
            return None
        tokenizer, tokens = self.task.backbone.tokenizer, one.targets[0]
        special = set(tokenizer.all_special_ids)
        if len(tokens) > self.identity.data.max_answer_tokens + 1 or special & set(tokens[:-1]):
            return None
        return one

    def predict(self, round: int) -> Said:
        """Draw an answer to every anchor; nothing where it repeats the client's own texts, or its owner forbids."""
        count = self.lesson.wanted
        if not count:
            return Said()
        if not self.identity.answers:
            log.info("this node's owner lets no answers in words go (answers in node.toml)")
            return Said(np.zeros((count, 1), np.float32), [""] * count)
        data, texts = self.identity.data, self._chosen(count, round)
        prompts = answer_prompts(self.adapter, self.task, texts, data)
        name = f"answers.{self.identity.client_id}.{round}"
        draw = int(generator(self.seed, name).integers(2**62))
        answers, sureness = draw_answers(
            self.adapter, prompts, data.max_answer_tokens, data.stop, draw
        )
        answers = [answer[:LONGEST_ANSWER] for answer in answers]
        for number in repeating(answers, self.identity.examples(self.seed)):
            answers[number] = ""
        # One that is kept back looks like one that was drawn empty.
        said = np.array([bool(answer) for answer in answers])
        return Said((sureness * said)[:, None].astype(np.float32), answers)
