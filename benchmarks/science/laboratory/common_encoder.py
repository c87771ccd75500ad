"""Rivals without training: every client reads its texts with one small model and tells class means of what it read.

* FedNCM (Legate et al., arXiv 2306.03937): the server pools the means by examples, and a class scores by the cosine of
  a text's features with its mean.
* FedCOF (Goswami et al., arXiv 2412.14326): the same means, but the server also reads off them how a class varies. The
  mean of n examples has the class's covariance over n, so over the K_c means that were told of class c::

      S_c = 1 / (K_c - 1)  sum_k n_kc (m_kc - m_c)(m_kc - m_c)'  +  gamma I
      G = sum_c (N_c - 1) S_c + N m m',   w_c = G^-1 N_c m_c / |G^-1 N_c m_c|

  It is ridge regression without what lies between classes. A client may deal a class's examples into ``means`` heaps
  and tell a mean of each: few clients tell too few means otherwise.

Features are rows; ``z`` is n x d, a classifier C x d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class ClassMeans:
    """What clients tell: of every heap its class, its examples, and their mean."""

    classes: NDArray[np.int64]
    counts: Matrix
    means: Matrix

    def __add__(self, other: ClassMeans) -> ClassMeans:
        return ClassMeans(
            np.concatenate([self.classes, other.classes]),
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.means, other.means]),
        )

    @property
    def numbers(self) -> int:
        """How many numbers this is on a wire: a mean and a count per heap."""
        return self.means.size + self.counts.size


def told_means(z: Matrix, labels: NDArray[np.int64], means: int = 1) -> ClassMeans:
    """A client's means: of every class in up to ``means`` heaps, dealt in the order of its examples."""
    found: list[tuple[int, int, Matrix]] = []
    for label in np.unique(labels).tolist():
        own = z[labels == label]
        for heap in range(min(means, len(own))):
            part = own[heap::means]
            found.append((label, len(part), part.mean(axis=0)))
    classes, counts, rows = zip(*found, strict=True)
    return ClassMeans(np.array(classes), np.array(counts, np.float64), np.stack(rows))


def pooled_means(told: ClassMeans, classes: int) -> tuple[Matrix, Matrix]:
    """(examples of every class, their mean C x d); a class that nobody told of is all zeros."""
    counts = np.bincount(told.classes, weights=told.counts, minlength=classes)
    sums = np.zeros((classes, told.means.shape[1]))
    np.add.at(sums, told.classes, told.counts[:, None] * told.means)
    return counts, sums / np.maximum(counts, 1)[:, None]


def _unit(rows: Matrix) -> Matrix:
    lengths: Matrix = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def nearest_mean(told: ClassMeans, classes: int) -> Matrix:
    """FedNCM's classifier."""
    return _unit(pooled_means(told, classes)[1])


def scatter_within(told: ClassMeans, classes: int) -> Matrix:
    """FedCOF's estimate of sum (N_c - 1) S_c (d x d), without gamma; unbiased where clients draw a class alike.

    Of a class of which a single mean was told nothing is known: it adds nothing.
    """
    counts, means = pooled_means(told, classes)
    heaps = np.bincount(told.classes, minlength=classes).astype(np.float64)
    weights = np.where(heaps > 1, (counts - 1) / np.maximum(heaps - 1, 1), 0.0)
    away = told.means - means[told.classes]
    away *= np.sqrt(weights[told.classes] * told.counts)[:, None]
    scatter: Matrix = away.T @ away
    return scatter


def covariances_for_free(told: ClassMeans, classes: int, gamma: float) -> Matrix:
    """FedCOF's classifier."""
    counts, means = pooled_means(told, classes)
    total = counts.sum()
    middle = counts @ means / total
    within = scatter_within(told, classes)
    ridge = gamma * np.maximum(counts - 1, 0).sum()
    gram = within + total * np.outer(middle, middle) + ridge * np.eye(len(middle))
    solved: Matrix = np.linalg.solve(gram, (counts[:, None] * means).T).T
    return _unit(solved)


def standardised(public: Matrix) -> tuple[Matrix, Matrix]:
    """Mean and spread of every feature over public texts, which everybody has."""
    spread = public.std(axis=0)
    return public.mean(axis=0), np.where(spread > 0, spread, 1)


def guesses(classifier: Matrix, z: Matrix) -> NDArray[np.int64]:
    """The class of every text (n); never one that nobody told of."""
    scores = np.where(classifier.any(axis=1), z @ classifier.T, -np.inf)
    found: NDArray[np.int64] = scores.argmax(axis=1)
    return found
