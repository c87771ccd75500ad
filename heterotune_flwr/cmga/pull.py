"""How far one client may pull what all of them share: no number it says of itself buys it more than a few others' say.

Means are weighed by numbers of examples, and who is sure of itself is heard louder; both are a client's own word. So

* in what all types share no update is longer than the median one of the round (:func:`shares_of_length`): CMGA's first
  step;
* in a mean of updates a client counts as at most :data:`MOST` times the median client of the run, however many examples
  it declares (:func:`usual_examples`). Honest clients with more count as so many: nothing tells whether they are;
* an update that is longer than :data:`MOST` times what is usual for its type, by what it trains and by past rounds, is
  shortened to that (:mod:`..federation.update_gate`): in every strategy, and in what one type shares;
* on no anchor is anybody heard more than :data:`LOUDEST` times as loud as the median client
  (:mod:`..channels.predictions.server`);
* what it tells of its classes is compared with what the others tell, and counts as at most :data:`MOST_TOLD` times the
  median client (:mod:`..channels.statistics.class_pool`).

Where nobody is extreme nothing but the first changes a number.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

#: Median clients that one may count as in a mean of updates.
MOST = 1.25
#: Median clients that one's class sums may count as: more, for whether they are true can be compared.
MOST_TOLD = 4.0
#: Median voices that one may have on an anchor: being sure is the point of it, so it is more.
LOUDEST = 4.0


def usual_examples(declared: Iterable[int]) -> float:
    """Examples of the median client (of an even number the lower one) of those that declare any."""
    having = [count for count in declared if count > 0]
    return float(statistics.median_low(having)) if having else 0.0


def shares_of_length(lengths: NDArray[np.float64], times: float = 1.0) -> NDArray[np.float64]:
    """What is used of every update, so that none is longer than ``times`` the median of those that move at all.

    Of an even number the lower one: long updates are the suspects.
    """
    moving = np.sort(lengths[lengths > 0])
    if not moving.size:
        return np.ones_like(lengths)
    bound = times * moving[(moving.size - 1) // 2]
    return np.asarray(bound / np.maximum(lengths, bound))


def longest(examples: float, most: float) -> float:
    """How many times as long as usual an update may be that counts as ``examples`` of at most ``most``.

    What it moves is the product: who has more examples than the median client has as much less of length.
    """
    return min(MOST, most / examples)


def no_heavier(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of clients of which none is above :data:`MOST` times the median one."""
    return np.minimum(weights, MOST * np.median(weights))


def no_louder(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (clients x n) of which none is above :data:`LOUDEST` times the median client's in its column."""
    return np.minimum(weights, LOUDEST * np.median(weights, axis=0))
