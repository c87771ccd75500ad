"""How far one client may pull what all of them share: no number it says of itself buys it more than a few others' say.

Means are weighed by numbers of examples, and who is sure of itself is heard louder; both are a client's own word. So

* in a mean of updates a client counts as at most :data:`MOST` times the median client of the run, however many examples
  it declares (:func:`usual_examples`). Honest clients with more count as so many: nothing tells whether they are;
* an update that is longer than :data:`MOST` times the usual one is shortened to that (:mod:`..federation.update_gate`);
* on no anchor is anybody heard more than :data:`LOUDEST` times as loud as the median client
  (:mod:`..channels.predictions.server`);
* what it tells of its classes is compared with what the others tell, and counts as at most :data:`MOST_TOLD` times the
  median client (:mod:`..channels.statistics.class_pool`).

Where nobody is extreme nothing of it changes a number.
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
