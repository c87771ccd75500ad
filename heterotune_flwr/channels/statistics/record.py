"""The shared discriminant on the wire: what a client tells of its classes, and what all of them together make of it.

A client tells, once, how many examples it has of every class, and the sum of their latents: ``C x (r + 1)`` numbers in
the space that all model types share, of the bare backbone. Back come the ``C x (r + 1)`` numbers of a linear
discriminant.
There is no tokenizer, width or depth in either. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors, pack, round_trip, tensor_digest
from heterotune_flwr.flower import RecordDict
from heterotune_flwr.protocol.wire import (
    CLASS_COUNTS,
    CLASS_SUMS,
    DISCRIMINANT,
    read_tensors,
)

Array = NDArray[np.float32]

_WEIGHT, _BIAS, _FITTED = "weight", "bias", "distill_share"
_COUNTS, _SUMS = "counts", "sums"
#: Of everything but the counts, which are whole numbers.
_CODEC, _WHOLE = "bf16", "fp32"
#: How far the mean of a class may lie from the anchors' (root mean square over latents, in standard deviations).
FARTHEST = 100.0


@dataclass(frozen=True)
class LinearClassifier:
    """Logits ``weight z + bias`` of the labels for a latent ``z``: ``C x r`` and ``C``.

    ``distill_share``: the share of them that stands beside a client's own logits while it fits others' predictions.
    """

    weight: Array
    bias: Array
    distill_share: float = 1.0

    @property
    def digest(self) -> str:
        """Identity of its numbers."""
        return tensor_digest(self._tensors)

    @property
    def rounded(self) -> LinearClassifier:
        """As it travels."""
        return self._of(round_trip(self._tensors, _CODEC))

    def add_to(self, content: RecordDict) -> None:
        """Add it to a request under construction."""
        content[DISCRIMINANT] = pack(self._tensors, _CODEC)

    @classmethod
    def read(cls, content: RecordDict) -> LinearClassifier | None:
        """Read that of a request, None where there is none (ExchangeError: malformed)."""
        tensors = read_tensors(content, DISCRIMINANT)
        if tensors is None:
            return None
        return cls._of(tensors)

    @property
    def _tensors(self) -> Tensors:
        distill_share = np.array([self.distill_share], np.float32)
        return {_WEIGHT: self.weight, _BIAS: self.bias, _FITTED: distill_share}

    @classmethod
    def _of(cls, tensors: Tensors) -> LinearClassifier:
        rest = dict(tensors)
        distill_share = rest.pop(_FITTED, np.zeros(0, np.float32))
        if distill_share.shape != (1,) or not 0 <= distill_share[0] <= 1:
            raise ExchangeError(
                "a discriminant's share in what is distill_share is a number from 0 to 1"
            )
        return cls(*_two(rest, _WEIGHT, _BIAS, "statistics"), float(distill_share[0]))


@dataclass(frozen=True)
class ClassSums:
    """What a client tells: examples of every class (``C``), and the sums of their latents (``C x r``)."""

    counts: Array
    sums: Array

    def add_to(self, content: RecordDict) -> None:
        """Add them to a reply under construction."""
        content[CLASS_SUMS] = pack({_SUMS: self.sums}, _CODEC)
        content[CLASS_COUNTS] = pack({_COUNTS: self.counts}, _WHOLE)

    @classmethod
    def read(cls, content: RecordDict) -> ClassSums | None:
        """Read those of a reply as they came, None where there are none (see :meth:`check`)."""
        sums_told, counts_told = (
            read_tensors(content, name) for name in (CLASS_SUMS, CLASS_COUNTS)
        )
        if sums_told is None and counts_told is None:
            return None
        tensors = {**(sums_told or {}), **(counts_told or {})}
        sums, counts = _two(tensors, _SUMS, _COUNTS, "class sums")
        return cls(counts, sums)

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
        if not (np.isfinite(counts).all() and np.isfinite(sums).all()):
            raise ExchangeError("class sums hold numbers that are not finite")
        told = counts > 0
        if (counts != np.round(counts)).any() or (counts < 0).any() or (counts[told] < least).any():
            raise ExchangeError(f"counts of classes are not 0, or whole numbers from {least}")
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


def _two(tensors: Mapping[str, Array], matrix: str, vector: str, what: str) -> tuple[Array, Array]:
    """A ``C x r`` matrix and a vector of ``C``, and nothing else."""
    if set(tensors) != {matrix, vector}:
        raise ExchangeError(f"the {what} hold {sorted(tensors)}")
    values: Tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    rows, column = values[matrix], values[vector]
    if rows.ndim != 2 or column.shape != (len(rows),):
        raise ExchangeError(f"the {what} are {list(rows.shape)} and {list(column.shape)}")
    return rows, column
