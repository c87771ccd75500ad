"""What is said of public anchors, on the wire: what clients of different models can compare and learn from.

Which anchors a round is about follows from the seed (:func:`...alignment.public_texts.round_anchors`), so only
predictions travel: ``n x C`` probabilities, one byte each. There is no tokenizer, width or depth in them. Of open text
:mod:`.token_record` has the same. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import UNIT8
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.wire import read_field

Array = NDArray[np.float32]

_TARGETS, _PREDICTIONS = "targets", "predictions"


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
    asked
        How many of the *next* round's anchors the client predicts on, 0 for none; null: as many as this round's. More
        than the pool: so many of the whole list.

    """

    digest: str
    pool: int
    count: int
    weight: float
    targets: Array | None = None
    batch: int = 0
    asked: int | None = None

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
        return not self.weight or self.targets is None

    def to_payload(self) -> Payload:
        """What travels."""
        fields: dict[str, Any] = {
            "digest": self.digest, "pool": self.pool, "count": self.count, "weight": self.weight,
            "batch": self.batch, "asked": self.wanted,
        }  # fmt: skip
        tensors = {} if self.targets is None else {_TARGETS: self.targets}
        fits = "" if self.is_empty else "fit "
        return Payload(tensors, fields, UNIT8, effort=f"{fits}{self.wanted} of {self.count}")

    @classmethod
    def from_payload(cls, payload: Payload) -> DistillationRequest:
        """Read what came (ExchangeError: malformed)."""
        fields = payload.fields
        digest = read_field(fields, "digest", str)
        pool, count, batch, asked = (
            read_field(fields, key, int) for key in ("pool", "count", "batch", "asked")
        )
        weight = read_field(fields, "weight", float)
        sizes = 1 <= count <= pool and asked >= 0 and batch >= 0
        if not sizes or not 0 <= weight < float("inf"):
            raise ExchangeError(
                f"the message asks the impossible of public texts: {dict(fields)}"[:300]
            )
        targets = None
        if payload.tensors:
            targets = as_probabilities(payload.tensors.get(_TARGETS), count)
        return cls(digest, pool, count, weight, targets, batch, asked)


@dataclass(frozen=True)
class Said:
    """What a client says of a round's anchors: label probabilities ``n x C``."""

    predictions: Array

    def to_payload(self) -> Payload:
        """What travels."""
        return Payload({_PREDICTIONS: self.predictions}, {}, UNIT8)

    @classmethod
    def from_payload(cls, payload: Payload) -> Said:
        """Read what came, to be checked by :func:`as_probabilities` (ExchangeError)."""
        if set(payload.tensors) != {_PREDICTIONS}:
            raise ExchangeError(f"what is said of public texts holds {sorted(payload.tensors)}")
        return cls(payload.tensors[_PREDICTIONS])


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
    if not np.isfinite(totals).all() or values.min(initial=0.0) < 0 or not (totals > 0).all():
        raise ExchangeError("predictions are no probabilities")
    return np.asarray(values / totals, dtype=np.float32)
