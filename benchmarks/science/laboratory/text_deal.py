"""Who has which texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.seeds import generator


@dataclass(frozen=True)
class Holder:
    """A client: the type it owns (an index), the rows it trains on, and what share of them each task has."""

    kind: int
    rows: Sequence[int]
    shares: NDArray[np.float64]


def deal(
    world_tasks: NDArray[np.int64], tasks: int, types: int, clients: int, partition: str, seed: int,
    examples: int = 96,
) -> list[Holder]:  # fmt: skip
    """``clients`` of each type, client i of type ``i mod types``; nobody holds a row that another holds.

    ``tasks``: every task has one owner, in an order that the seed draws. ``dirichlet``: every client draws its own
    mixture of tasks (0.3).
    """
    total = clients * types
    decks = [
        generator(seed, f"texts.deck.{task}")
        .permutation(np.flatnonzero(world_tasks == task))
        .tolist()
        for task in range(tasks)
    ]
    if partition == "tasks":
        if tasks % total:
            raise SystemExit(f"{tasks} tasks cannot be dealt evenly to {total} clients")
        order = generator(seed, "texts.tasks").permutation(tasks).reshape(total, -1)
        wanted = [np.bincount(own, minlength=tasks) / len(own) for own in order]
    else:
        draws = (generator(seed, f"texts.dirichlet.{i}") for i in range(total))
        wanted = [rng.dirichlet(np.full(tasks, 0.3)) for rng in draws]
    holders = []
    for number, mixture in enumerate(wanted):
        rng, rows = generator(seed, f"texts.rows.{number}"), []
        while len(rows) < min(examples, len(world_tasks) // total):
            left = np.array([len(deck) for deck in decks]) > 0
            weights = np.where(left, mixture, 0.0)
            if not weights.sum():  # its tasks are dealt out
                if partition == "tasks":
                    break
                weights = left.astype(float)
            rows.append(decks[rng.choice(tasks, p=weights / weights.sum())].pop())
        own = np.bincount(world_tasks[rows], minlength=tasks) / len(rows)
        holders.append(Holder(number % types, rows, own))
    return holders
