"""Which clients take part in a round: a function of stable client ids, the seed and the round.

Flower's node ids and their order differ between runs with equal seeds, so nothing is drawn from
them.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable

import numpy as np


def named_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random generator derived from one seed and some names."""
    words = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.default_rng([abs(seed), *words])


def sample_size(total: int, participation: float, oversample: float = 0.0) -> int:
    """How many of ``total`` clients a round asks: ``participation * (1 + oversample)`` of them, at least one."""
    return min(total, max(1, int(np.floor(participation * (1 + oversample) * total + 0.5))))


def sample_clients(
    client_ids: Iterable[str],
    participation: float,
    seed: int,
    round: int,
    benched: Collection[str] = (),
    oversample: float = 0.0,
) -> list[str]:
    """Draw :func:`sample_size` clients without replacement, sorted; all that are left where there are fewer.

    Uniform over clients whatever their type: a type can be absent from a round, as in a real
    federation. A function of the ids, the seed, the round and the ``benched`` set, which is left out; the order of
    ``client_ids`` does not matter.
    """
    everybody = set(client_ids)
    ordered = sorted(everybody - set(benched))
    count = sample_size(len(everybody), participation, oversample)
    if count >= len(ordered):
        return ordered
    rng = named_generator(seed, "sampling", round)
    chosen = rng.choice(len(ordered), size=count, replace=False)
    return [ordered[index] for index in sorted(chosen)]
