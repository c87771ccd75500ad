"""What flows through the chain, and small linear algebra on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.trees import State

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
#: Two updates below this cosine pull apart; between it and 0 it may be noise.
CONFLICT = -0.1


@dataclass(frozen=True)
class Member:
    """One participant of an aggregation: a client, after ``within_type_mean`` a whole type.

    ``vector`` is its pseudo-gradient of one slot, shape ``(n,)``; ``examples`` its weight.
    """

    key: str
    type_key: str
    vector: Vector
    examples: float

    @property
    def size(self) -> int:
        """Length of the vector."""
        return int(self.vector.size)

    def scaled(self, factor: float) -> Member:
        """The same member with ``factor`` times its vector."""
        if factor == 1.0:
            return self
        return Member(self.key, self.type_key, factor * self.vector, self.examples)


@dataclass(frozen=True)
class Updates:
    """The updates of one slot in one round.

    Attributes
    ----------
    round, seed
        Name the random numbers a transform may draw.
    members
        What the next transform works on: clients, sorted by (type, client), then types, then the one direction.
    types
        One update per type, set by ``within_type_mean``; what the log compares the direction with.
    log
        What a user looks at to understand a round; JSON-able.

    """

    round: int
    seed: int
    members: tuple[Member, ...]
    types: tuple[Member, ...] = ()
    log: Mapping[str, Any] = field(default_factory=dict)

    @property
    def direction(self) -> Vector:
        """The one combined direction; FederationError before ``combine`` ran."""
        if len(self.members) != 1:
            raise FederationError("the CMGA chain ended without `combine`")
        return self.members[0].vector

    def logged(self, **entries: Any) -> dict[str, Any]:
        """The log with further entries."""
        return {**self.log, **entries}


@dataclass(frozen=True)
class Transform:
    """A pure (init, update) pair; see the package docstring."""

    name: str
    init: Callable[[], State]
    update: Callable[[Updates, State], tuple[Updates, State]]


class LazyMember(Member):
    """A client whose vector is read anew at each use: those of very many are not in memory."""

    def __init__(
        self, key: str, type_key: str, examples: float, size: int, read: Callable[[], Vector]
    ) -> None:
        given = {
            "key": key,
            "type_key": type_key,
            "examples": examples,
            "_size": size,
            "_read": read,
        }
        self.__dict__.update(given)

    @property
    def vector(self) -> Vector:  # type: ignore[override]
        """Read it."""
        read: Callable[[], Vector] = self.__dict__["_read"]
        return read()

    @property
    def size(self) -> int:
        """Length of the vector, which is not read for it."""
        return int(self.__dict__["_size"])

    def scaled(self, factor: float) -> Member:
        """The same member with ``factor`` times its vector, which is still read at each use."""
        read: Callable[[], Vector] = self.__dict__["_read"]
        if factor == 1.0:
            return self
        return LazyMember(
            self.key, self.type_key, self.examples, self.size, lambda: factor * read()
        )


def weighted_mean(members: Iterable[Member]) -> Vector:
    """Example-weighted mean vector, summed in (type, key) order; shape ``(n,)``."""
    ordered = sorted(members, key=lambda member: (member.type_key, member.key))
    total = sum(member.examples for member in ordered)
    mean = np.zeros(ordered[0].size)
    for member in ordered:
        mean += (member.examples / total) * member.vector
    return mean


def make_updates(clients: Iterable[Member], round: int = 0, seed: int = 0) -> Updates:
    """Collect the clients of one slot; the order they come in does not matter.

    Raises
    ------
    FederationError
        No client, lengths that differ, or a client without a positive number of examples.

    """
    ordered = tuple(sorted(clients, key=lambda member: (member.type_key, member.key)))
    if not ordered:
        raise FederationError("there is no update to aggregate")
    if len({member.size for member in ordered}) != 1:
        raise FederationError("updates of one slot differ in length")
    for member in ordered:
        if not member.examples > 0:
            raise FederationError(f"{member.key} reports {member.examples} examples, not above 0")
    return Updates(round, seed, ordered)


def gram(members: Iterable[Member]) -> Matrix:
    """All inner products, shape ``(M, M)``."""
    stacked = np.stack([member.vector for member in members])
    return np.asarray(stacked @ stacked.T)


def cosines(products: Matrix) -> Matrix:
    """Cosines of a Gram matrix; 0 where a vector is zero."""
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    scale = np.outer(norms, norms)
    safe = np.where(scale > 0, scale, 1.0)
    return np.where(scale > 0, products / safe, 0.0)


def conflict_rate(products: Matrix) -> float:
    """Share of the pairs whose cosine is below :data:`CONFLICT`, from a Gram matrix; 0 without a pair."""
    pairs = cosines(products)[np.triu_indices(len(products), 1)]
    return float((pairs < CONFLICT).mean()) if pairs.size else 0.0


def pairwise(names: list[str], values: Matrix) -> dict[str, float]:
    """Upper triangle of a symmetric matrix as ``{"a|b": value}``."""
    return {
        f"{names[i]}|{names[j]}": float(values[i, j])
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
