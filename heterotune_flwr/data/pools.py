"""What is asked of a whole pool of examples again and again, worked out once per process.

A pool is read once and kept (:mod:`.sources`), so it is known by being the same object: to hash its thousands of
examples at every look-up would take longer than what is looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from heterotune_flwr.data.examples import Example


class Pool:
    """A pool as a key: equal to itself alone. It keeps the examples alive, so no other can take their place."""

    def __init__(self, examples: tuple[Example, ...]) -> None:
        self.examples = examples

    def __eq__(self, other: object) -> bool:
        """Whether it is the very same pool."""
        return isinstance(other, Pool) and self.examples is other.examples

    def __hash__(self) -> int:
        """Identity of the pool."""
        return id(self.examples)


@functools.lru_cache(maxsize=16)
def _answers(pool: Pool) -> tuple[str, ...]:
    return tuple(sorted({example.label for example in pool.examples}))


def answers_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the different answers of a pool, sorted; remembered for one that is a tuple."""
    pool = Pool(examples if isinstance(examples, tuple) else tuple(examples))
    return _answers(pool)
