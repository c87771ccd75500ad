"""A simulation's clients in their order: of which type each is, and which natural clients its type names for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from heterotune_flwr.data.partition import Owners
from heterotune_flwr.schema import Config, TypeConfig


def expand_types(types: Sequence[TypeConfig]) -> list[TypeConfig]:
    """Type of every simulated client: the types in turn, each until it has its number of clients."""
    return [types[index] for index in _turns(tuple(item.clients for item in types))]


@functools.lru_cache(maxsize=16)
def _turns(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Index of the type of every client, in turn."""
    left, order = list(counts), []
    while any(left):
        for index in range(len(left)):
            if left[index] > 0:
                left[index] -= 1
                order.append(index)
    return tuple(order)


def owners_of(config: Config) -> Owners:
    """The natural clients that every client's type names for it: the first client of a type gets the first ones."""
    if not any(entry.owners for entry in config.types):
        return ()
    each = config.data.groups_per_client
    given = [0] * len(config.types)
    found = []
    for index in _turns(tuple(item.clients for item in config.types)):
        names, start = config.types[index].owners or [], given[index]
        found.append(tuple(names[start : start + each]))
        given[index] += each
    return tuple(found)
