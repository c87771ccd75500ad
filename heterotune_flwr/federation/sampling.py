"""Which clients take part in a round: a function of stable client ids, the seed and the round.

Flower's node ids and their order differ between runs with equal seeds, so nothing is drawn from
them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np


def named_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random generator derived from one seed and some names."""
    words = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.default_rng([abs(seed), *words])


def sample_clients(
    client_ids: Iterable[str], participation: float, seed: int, round: int
) -> list[str]:
    """Draw ``round(participation * n)`` clients (at least one) without replacement, sorted.

    Uniform over clients whatever their type: a type can be absent from a round, as in a real
    federation. The order of ``client_ids`` does not matter.
    """
    ordered = sorted(client_ids)
    if participation >= 1.0 or not ordered:
        return ordered
    count = max(1, int(np.floor(participation * len(ordered) + 0.5)))
    rng = named_generator(seed, "sampling", round)
    chosen = rng.choice(len(ordered), size=count, replace=False)
    return [ordered[index] for index in sorted(chosen)]
