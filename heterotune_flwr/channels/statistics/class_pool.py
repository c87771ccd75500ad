"""Classes that many clients tell of, pooled so that none of them decides alone where a class lies.

Of a client's ``n`` examples of a class, whose mean lies ``d`` from the mean of the ``N`` that others tell of it, chance
alone explains ``q = d^2 n N / (n + N)`` of the order of a class's own spread, whatever ``n`` is. What is usual, types
that are not perfectly aligned included, is the median of ``q`` over all that is told. A mean that is stranger than
:data:`FAR_CLASS` times that, and all means of a client whose ``q`` are on average :data:`FAR` times that, keep their
place but count as fewer examples: the further away it is, the less it pulls, and claiming a large ``n`` makes ``q``
larger. (As in a meta-analysis with random effects, where a study's claim to precision is not believed beyond what its
distance from the others bears out.) Nothing is said against a class that nobody else tells of.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.exchange.trees import State

Matrix = NDArray[np.float64]

#: How many times as strange as usual one class of a client may be, and a client over its classes, to count in full.
#: Honest clients reach 3.1 and 1.3 (benchmarks/reliability/attack_run.py's, of equal and of very different size).
FAR_CLASS, FAR = 4.0, 2.0
#: The others are weighed as they have come out so far.
_PASSES = 6
#: Clients below which nobody is compared: of two nobody knows who is right.
_COMPARABLE = 3


@dataclass(frozen=True)
class Classes:
    """Examples of every class (``C``) and the sums of their latents (``C x r``), of some clients."""

    counts: Matrix
    sums: Matrix

    def __add__(self, other: Classes) -> Classes:
        return Classes(self.counts + other.counts, self.sums + other.sums)


def pooled(parts: Iterable[Classes]) -> Classes | None:
    """All of them together; None of nobody's."""
    found = list(parts)
    return functools.reduce(operator.add, found) if found else None


@dataclass(frozen=True)
class _Told:
    """What one client told: its type, the classes (``k``), their examples (``k``) and sums (``k x r``)."""

    type_key: str
    classes: NDArray[np.int64]
    counts: NDArray[np.float32]
    sums: NDArray[np.float32]


@dataclass(frozen=True)
class _Rows:
    """One row for every class of every client: which, how many examples are claimed, their sum of latents."""

    classes: NDArray[np.int64]
    claimed: Matrix
    sums: NDArray[np.float32]

    def only(self, chosen: NDArray[np.bool_]) -> _Rows:
        """Some of the rows."""
        return _Rows(self.classes[chosen], self.claimed[chosen], self.sums[chosen])


class ClassPool:
    """All that has been told, by client, and what it comes to.

    Parameters
    ----------
    classes
        C.
    metric
        Weight of every latent in a distance (``r``).
    most
        As how many examples one client counts at most.

    """

    def __init__(self, classes: int, metric: Matrix, most: float) -> None:
        self._classes, self._metric, self._most = classes, metric, most
        self._told: dict[str, _Told] = {}
        #: What each client's examples count for, as a share of those it told of; of those below 1.
        self.shares: dict[str, float] = {}

    def add(self, client_id: str, type_key: str, told: ClassSums) -> None:
        """Keep what a client tells."""
        known = np.flatnonzero(told.counts > 0)
        self._told[client_id] = _Told(
            type_key, known, told.counts[known].astype(np.float32), told.sums[known]
        )

    def totals(self, groups: Mapping[str, str] | None = None) -> dict[str, Classes]:
        """What it comes to, by type: a function of what was told, not of the order in which it was.

        Parameters
        ----------
        groups
            Among whom each type's clients are compared; null: nobody is, only the most that one counts as is kept.

        """
        ids = sorted(self._told)
        if not ids:
            return {}
        told = [self._told[client_id] for client_id in ids]
        whose = np.repeat(np.arange(len(ids)), [len(one.classes) for one in told])
        rows = _Rows(
            np.concatenate([one.classes for one in told]),
            np.concatenate([one.counts for one in told]).astype(np.float64),
            np.concatenate([one.sums for one in told]),
        )
        all_of = np.maximum(np.bincount(whose, rows.claimed, len(ids)), 1e-12)
        counted = rows.claimed * np.minimum(1.0, self._most / all_of)[whose]
        types = np.array([one.type_key for one in told])
        for group in sorted(set((groups or {}).values())):
            members = np.array([(groups or {}).get(key) == group for key in types])
            if members.sum() >= _COMPARABLE:
                chosen = members[whose]
                counted[chosen] = self._believed(whose[chosen], rows.only(chosen), counted[chosen])
        share = np.bincount(whose, counted, len(ids)) / all_of
        self.shares = {cid: float(s) for cid, s in zip(ids, share, strict=True) if s < 1}
        return {
            str(key): self._sum(rows.only(mine), counted[mine])
            for key in np.unique(types)
            for mine in [(types == key)[whose]]
        }

    def _sum(self, rows: _Rows, counted: Matrix) -> Classes:
        found = np.zeros((self._classes, len(self._metric)))
        np.add.at(found, rows.classes, rows.sums * (counted / rows.claimed)[:, None])
        counts = np.bincount(rows.classes, counted, self._classes).astype(np.float64)
        return Classes(counts, found)

    def _believed(self, whose: NDArray[np.int64], rows: _Rows, capped: Matrix) -> Matrix:
        """As how many examples each class of each client counts."""
        counted = capped
        for _ in range(_PASSES):
            strange = np.zeros(len(capped))
            for one in np.unique(rows.classes):
                chosen = np.flatnonzero(rows.classes == one)
                means = rows.sums[chosen] / rows.claimed[chosen, None]
                precision = _precision(rows.claimed[chosen], capped[chosen])
                strange[chosen] = precision * self._distances(means, counted[chosen])
            compared = strange > 0
            if not compared.any():
                return capped
            strange /= float(np.median(strange[compared]))
            of_client = np.bincount(whose, strange) / np.maximum(np.bincount(whose, compared), 1)
            share = _within(FAR_CLASS, strange) * _within(FAR, of_client)[whose]
            counted = capped * share
        return counted

    def _distances(self, means: Matrix, counted: Matrix) -> Matrix:
        """``d^2`` of every client's mean (``k x r``) of one class from the others'; 0 where there are none."""
        others = counted.sum() - counted
        there = others > 0
        rest = (counted @ means - counted[:, None] * means) / np.where(there, others, 1.0)[:, None]
        return np.where(there, ((means - rest) ** 2) @ self._metric, 0.0)

    # ------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> State:
        """All that was told."""
        ids = sorted(self._told)
        told = [self._told[client_id] for client_id in ids]
        empty = np.zeros((0, len(self._metric)), np.float32)
        return {
            "clients": ids,
            "types": [one.type_key for one in told],
            "sizes": [len(one.classes) for one in told],
            "classes": np.concatenate([one.classes for one in told] or [np.zeros(0, np.int64)]),
            "counts": np.concatenate([one.counts for one in told] or [np.zeros(0, np.float32)]),
            "sums": np.concatenate([one.sums for one in told] or [empty]),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        ends = np.cumsum(state["sizes"], dtype=np.int64)
        starts = ends - np.array(state["sizes"], np.int64)
        self._told = {
            client_id: _Told(
                type_key, *(state[name][start:end] for name in ("classes", "counts", "sums"))
            )
            for client_id, type_key, start, end in zip(
                state["clients"], state["types"], starts, ends, strict=True
            )
        }


def _within(limit: float, strange: Matrix) -> Matrix:
    """What is left of somebody's examples: all up to the limit, beyond it the less the stranger they are."""
    return np.asarray(np.minimum(1.0, limit / np.maximum(strange, 1e-300)) ** 2)


def _precision(claimed: Matrix, capped: Matrix) -> Matrix:
    """``n N / (n + N)`` of every client, by what it claims and by what the others may count as."""
    others = capped.sum() - capped
    return np.asarray(claimed * others / (claimed + others))
