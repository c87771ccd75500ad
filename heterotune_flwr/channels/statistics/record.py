"""Class statistics on the wire: what a client tells of its classes, and what all of them together make of it.

A client tells, once, how many examples it has of every class, and the sum of their latents: ``C x (r + 1)`` numbers in
the space that all model types share, of the bare backbone. Back come the ``C x (r + 1)`` numbers of a linear
classifier. There is no tokenizer, width or depth in either. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors, round_trip
from heterotune_flwr.protocol.payloads import Array, Payload
from heterotune_flwr.protocol.wire import read_field

_WEIGHT, _BIAS, _SHARE, _MIN_COUNT = "weight", "bias", "distill_share", "min_count"
_COUNTS, _SUMS = "counts", "sums"
_CODEC = "bf16"
#: How far the mean of a class may lie from the anchors' (root mean square over latents, in standard deviations).
FARTHEST = 100.0
#: No client has more examples of a class.
_MOST_EXAMPLES = 10**9


@dataclass(frozen=True)
class LinearClassifier:
    """Logits ``weight z + bias`` of the labels for a latent ``z``: ``C x r`` and ``C``."""

    weight: Array
    bias: Array

    @property
    def rounded(self) -> LinearClassifier:
        """As it travels."""
        values = round_trip({_WEIGHT: self.weight, _BIAS: self.bias}, _CODEC)
        return LinearClassifier(values[_WEIGHT], values[_BIAS])


@dataclass(frozen=True)
class Request:
    """What a client is asked and brought.

    Attributes
    ----------
    classifier
        Adds to the labels' logits, null where nothing does.
    min_count
        Sums are asked of classes with so many examples; 0: of none.
    distill_share
        Share of the classifier's logits that stands beside a client's own while it fits others' predictions.

    """

    classifier: LinearClassifier | None
    min_count: int = 0
    distill_share: float = 1.0

    def to_payload(self) -> Payload:
        """What travels."""
        fields = {_MIN_COUNT: self.min_count, _SHARE: self.distill_share}
        tensors: Tensors = {}
        if self.classifier is not None:
            tensors = {_WEIGHT: self.classifier.weight, _BIAS: self.classifier.bias}
        return Payload(tensors, fields, _CODEC, effort="logits" if tensors else "")

    @classmethod
    def from_payload(cls, payload: Payload) -> Request:
        """Read what came (ExchangeError: malformed)."""
        share = read_field(payload.fields, _SHARE, float)
        if not 0 <= share <= 1:
            raise ExchangeError("a classifier's share in what is fitted is a number from 0 to 1")
        classifier = None
        if payload.tensors:
            classifier = LinearClassifier(*_two(payload, _WEIGHT, _BIAS))
        return cls(classifier, read_field(payload.fields, _MIN_COUNT, int), share)


@dataclass(frozen=True)
class ClassSums:
    """What a client tells: examples of every class (``C``), and the sums of their latents (``C x r``)."""

    counts: Array
    sums: Array

    def to_payload(self) -> Payload:
        """What travels; the counts exactly."""
        counts = [int(count) for count in self.counts]
        return Payload({_SUMS: self.sums}, {_COUNTS: counts}, _CODEC)

    @classmethod
    def from_payload(cls, payload: Payload) -> ClassSums:
        """Read what came, to be checked by :meth:`check` (ExchangeError: malformed)."""
        counts = read_field(payload.fields, _COUNTS, list)
        if not all(type(count) is int and 0 <= count <= _MOST_EXAMPLES for count in counts):
            raise ExchangeError("counts of classes are no whole numbers")
        sums = payload.tensors.get(_SUMS)
        if set(payload.tensors) != {_SUMS} or sums is None or sums.shape[:-1] != (len(counts),):
            raise ExchangeError("class sums have another shape than their counts")
        return cls(np.array(counts, np.float32), np.asarray(sums, np.float32))

    def check(self, classes: int, spreads: NDArray[np.float64], least: int, examples: int) -> float:
        """Refuse what a client with ``examples`` of its own cannot have.

        Returns how far its farthest class lies from the anchors' mean: root mean square over the latents, in their
        standard deviations; 0 where it tells of none.

        Parameters
        ----------
        classes
            C.
        spreads
            Standard deviation of every latent over the anchors (``r``).
        least
            Examples of a class below which nothing is told of it.
        examples
            How many the client has said it has.

        Raises
        ------
        ExchangeError
            Another shape, numbers that are not finite, counts that are none or too many, means far from all anchors.

        """
        counts, sums = self.counts.astype(np.float64), self.sums.astype(np.float64)
        if sums.shape != (classes, len(spreads)):
            raise ExchangeError(
                f"class sums are {list(sums.shape)}, expected {classes} x {len(spreads)}"
            )
        if not np.isfinite(sums).all():
            raise ExchangeError("class sums hold numbers that are not finite")
        told = counts > 0
        if (counts[told] < least).any():
            raise ExchangeError(f"counts of classes are neither 0 nor from {least}")
        if counts.sum() > examples:
            raise ExchangeError(
                f"class sums are of {counts.sum():.0f} examples, more than the {examples} declared"
            )
        if sums[~told].any():
            raise ExchangeError("there are sums of classes without examples")
        means = sums[told] / counts[told, None] / np.maximum(spreads, 1e-12)
        farthest = float(np.sqrt((means**2).mean(axis=1)).max(initial=0.0))
        if farthest > FARTHEST:
            raise ExchangeError(
                f"a class lies {farthest:.3g} standard deviations from the anchors, {FARTHEST:g} at most"
            )
        return farthest


def _two(payload: Payload, matrix: str, vector: str) -> tuple[Array, Array]:
    """A ``C x r`` matrix and a vector of ``C``, and nothing else."""
    if set(payload.tensors) != {matrix, vector}:
        raise ExchangeError(f"a classifier holds {sorted(payload.tensors)}")
    rows, column = (np.asarray(payload.tensors[name], np.float32) for name in (matrix, vector))
    if rows.ndim != 2 or column.shape != (len(rows),):
        raise ExchangeError(f"a classifier is {list(rows.shape)} and {list(column.shape)}")
    return rows, column
