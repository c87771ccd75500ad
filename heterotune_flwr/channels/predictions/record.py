"""What is said of public anchors, on the wire: what clients of different models can compare and learn from.

Which anchors a round is about follows from the seed (:func:`...alignment.public_texts.round_anchors`), so only
predictions travel: ``n x C`` probabilities, one byte each, or, on open text, ``n`` answers in words. There is no
tokenizer, width or depth in either. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import UNIT8
from heterotune_flwr.exchange.packing import pack
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.wire import (
    ANSWERS,
    CONSENSUS,
    PREDICTIONS,
    read_config,
    read_field,
    read_json,
    read_tensors,
    read_texts,
)

Array = NDArray[np.float32]

_FIELD, _TARGETS = "predictions", "targets"
#: Letters of one answer.
LONGEST_ANSWER = 2000
#: Above it chances would be all or nothing.
MOST_FOCUS = 8.0


@dataclass(frozen=True)
class DistillationRequest:
    """What the server asks of a client on the anchors in one round.

    Attributes
    ----------
    digest
        Identity of the anchors read (:func:`...alignment.public_texts.anchor_digest`), the first ``extent`` of the
        list: both sides must read the same texts.
    pool, count
        Anchors in use, and how many of them this round is about.
    weight
        Of the distillation loss beside the loss on the client's own examples.
    targets
        ``count x C``: the federation's mean predictions on *this* round's anchors, None while there are none.
    batch
        Anchors in every training step; 0: as many as examples.
    words
        Whether the client answers in words (open text) instead of label probabilities.
    answers
        With ``words``, in the place of ``targets``: what to answer on each anchor, "" where nothing.
    asked
        How many of the *next* round's anchors the client predicts on, 0 for none; null: as many as this round's. More
        than the pool: so many of the whole list.
    informativeness_power
        How much more often the client draws anchors whose targets say something (:mod:`.loss`).

    """

    digest: str
    pool: int
    count: int
    weight: float
    targets: Array | None = None
    batch: int = 0
    words: bool = False
    answers: list[str] | None = None
    asked: int | None = None
    informativeness_power: float = 0.0

    @property
    def wanted(self) -> int:
        """How many of the next round's anchors the client predicts on."""
        return self.count if self.asked is None else self.asked

    @property
    def extent(self) -> int:
        """How many anchors of the list the client reads."""
        return max(self.pool, self.wanted)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not self.weight or (self.targets is None and not any(self.answers or ()))

    def add_to(self, content: RecordDict, config: ConfigRecord) -> None:
        """Add the lesson to a request under construction."""
        fields: dict[str, Any] = {
            "digest": self.digest,
            "pool": self.pool,
            "count": self.count,
            "weight": self.weight,
            "batch": self.batch,
        }
        if self.words:
            fields["words"] = True
        if self.wanted != self.count:
            fields["asked"] = self.wanted
        if self.informativeness_power:
            fields["informativeness_power"] = self.informativeness_power
        config[_FIELD] = json.dumps(fields, separators=(",", ":"))
        if self.targets is not None:
            content[CONSENSUS] = pack({_TARGETS: self.targets}, UNIT8)
        add_answers(config, self.answers)

    @classmethod
    def read(cls, content: RecordDict, config: ConfigRecord) -> DistillationRequest | None:
        """Read the lesson of a request; None where it has none.

        Raises
        ------
        ExchangeError
            It is malformed.

        """
        if _FIELD not in config:
            return None
        fields: Any = read_json(config, _FIELD)
        if not isinstance(fields, dict):
            raise ExchangeError("field 'consensus' of the message is not a JSON object")
        pool, count = read_field(fields, "pool", int), read_field(fields, "count", int)
        weight, batch = read_field(fields, "weight", float), read_field(fields, "batch", int)
        asked = read_field(fields, "asked", int) if "asked" in fields else None
        informativeness_power = (
            read_field(fields, "informativeness_power", float)
            if "informativeness_power" in fields
            else 0.0
        )
        words = "words" in fields and read_field(fields, "words", bool)
        sizes = 1 <= count <= pool and (asked or 0) >= 0 and batch >= 0
        if (
            not sizes
            or not 0 <= weight < float("inf")
            or not 0 <= informativeness_power <= MOST_FOCUS
        ):
            raise ExchangeError(f"field 'consensus' of the message asks the impossible: {fields}")
        tensors = read_tensors(content, CONSENSUS)
        targets = None
        if tensors is not None:
            targets = as_probabilities(tensors.get(_TARGETS), count)
        answers = read_answers(config)
        if answers is not None:
            answers = as_answers(answers, count)
        digest = read_field(fields, "digest", str)
        return cls(
            digest,
            pool,
            count,
            weight,
            targets,
            batch,
            words,
            answers,
            asked,
            informativeness_power,
        )


def asks_otherwise(content: RecordDict) -> bool:
    """Whether a request's lesson asks for predictions on more or fewer anchors than it is about."""
    config = read_config(content)
    return _FIELD in config and "asked" in read_json(config, _FIELD)


def add_predictions(content: RecordDict, predictions: Array | None) -> None:
    """Add a client's predictions to its reply."""
    if predictions is not None:
        content[PREDICTIONS] = pack({PREDICTIONS: predictions}, UNIT8)


def read_predictions(content: RecordDict) -> Array | None:
    """Read the predictions of a reply as they came, None where there are none (see :func:`as_probabilities`)."""
    tensors = read_tensors(content, PREDICTIONS)
    if tensors is None:
        return None
    if set(tensors) != {PREDICTIONS}:
        raise ExchangeError(f"record 'predictions' holds {sorted(tensors)}")
    return tensors[PREDICTIONS]


def add_answers(config: ConfigRecord, answers: Sequence[str] | None) -> None:
    """Add answers in words to a request or reply under construction."""
    if answers is not None:
        config[ANSWERS] = list(answers)


def read_answers(config: ConfigRecord) -> list[str] | None:
    """Read the answers of a message as they came, None where there are none (see :func:`as_answers`)."""
    return read_texts(config, ANSWERS) if ANSWERS in config else None


def as_answers(answers: list[str] | None, count: int) -> list[str]:
    """Check ``count`` answers (ExchangeError: missing, another number, or one longer than ``LONGEST_ANSWER``)."""
    if answers is None or len(answers) != count:
        found = "nothing" if answers is None else f"{len(answers)} texts"
        raise ExchangeError(f"answers on anchors are {found}, expected {count} texts")
    if (longest := max(map(len, answers))) > LONGEST_ANSWER:
        raise ExchangeError(
            f"an answer on an anchor has {longest} letters, {LONGEST_ANSWER} at most"
        )
    return answers


def as_probabilities(values: Array | None, count: int, classes: int | None = None) -> Array:
    """Check ``count x C`` numbers and make every row sum to 1 again, which rounding has undone.

    Raises
    ------
    ExchangeError
        Missing, another shape, not finite, negative, or a row of zeros.

    """
    if (
        values is None
        or values.ndim != 2
        or len(values) != count
        or classes not in (None, values.shape[1])
    ):
        shape = "nothing" if values is None else list(values.shape)
        raise ExchangeError(f"predictions are {shape}, expected {count} x {classes or 'C'}")
    totals = values.sum(axis=1, keepdims=True, dtype=np.float64)
    if not np.isfinite(totals).all() or values.min() < 0 or not (totals > 0).all():
        raise ExchangeError("predictions are no probabilities")
    return np.asarray(values / totals, dtype=np.float32)
