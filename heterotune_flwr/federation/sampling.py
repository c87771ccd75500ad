"""Which clients take part in a round: a function of stable client ids, the seed and the round.

Flower's node ids and their order differ between runs with equal seeds, so nothing is drawn from
them.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

#: Clients that are tested where nobody says how many.
TESTED = 48


def named_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random generator derived from one seed and some names."""
    words = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.default_rng([abs(seed), *words])


def sample_size(total: int, participation: float, oversample: float = 0.0) -> int:
    """How many of ``total`` clients a round asks: ``participation * (1 + oversample)`` of them, at least one."""
    return min(total, max(1, int(np.floor(participation * (1 + oversample) * total + 0.5))))


def draw_tested(by_type: Mapping[str, Sequence[str]], wanted: float | None, seed: int) -> list[str]:
    """Draw who is tested, sorted: a function of the clients' ids and types, ``server.evaluate_clients`` and the seed.

    ``wanted`` is a number of clients, below 1 a share of them, None: all up to :data:`TESTED`. Every type has its share
    of the drawn, and at least one.
    """
    total = sum(len(members) for members in by_type.values())
    if wanted is None:
        count = min(total, TESTED)
    else:
        count = sample_size(total, wanted) if wanted < 1 else min(total, int(wanted))
    chosen: list[str] = []
    for type_key, members in sorted(by_type.items()):
        share = sample_size(len(members), count / total)
        rng = named_generator(seed, "tested", type_key)
        picked = rng.choice(len(members), size=share, replace=False)
        chosen += [sorted(members)[index] for index in picked]
    return sorted(chosen)


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
