"""Rules about directions, for clients whose tasks pull apart; off unless a chain names them.

Before ``within_type_mean`` they work on clients, after it on types. Both give linear combinations of the M updates,
found on their Gram matrix (M x M), so several hundred clients are cheap; all updates are in memory at once.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from heterotune_flwr.cmga.base import Matrix, Member, Transform, Updates, Vector, conflict_rate
from heterotune_flwr.cmga.combining import conclude
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State

#: Most orders of visits that PCGrad averages over.
_ORDERS = 24


def pcgrad() -> Transform:
    """PCGrad (arXiv 2001.06782): each update loses its part along every other whose inner product with it is negative.

    Averaged over all orders of visits, or 24 drawn ones where there are more, instead of over one that is drawn. No
    update gets longer.
    """

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        stacked = np.stack([member.vector for member in updates.members])
        products = stacked @ stacked.T
        log = updates.logged(conflict_rate=conflict_rate(products))
        if (products < 0).any():
            orders = list(_orders(len(products), updates))
            stacked = np.mean([_projected(products, order) for order in orders], axis=0) @ stacked
        changed = tuple(
            Member(m.key, m.type_key, vector, m.examples)
            for m, vector in zip(updates.members, stacked, strict=True)
        )
        return replace(updates, members=changed, log=log), state

    return Transform("pcgrad", dict, update)


def cagrad(c: float = 0.5) -> Transform:
    """CAGrad (arXiv 2110.14048): the best worst update's direction within ``c |g0|`` of the mean ``g0``.

    ``d = g0 + sqrt(phi) / |g_w| g_w`` with ``phi = c^2 |g0|^2``, ``g_w = w G`` and w on the simplex minimising
    ``<g_w, g0> + sqrt(phi) |g_w|``; G: the updates, one a row.

    Parameters
    ----------
    c
        How far from the mean the direction may lie, in lengths of the mean, in [0, 1). [share]

    """
    if not 0 <= c < 1:
        raise ConfigError(f"cagrad.c is {c}, it must be in [0, 1)")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        stacked = np.stack([member.vector for member in updates.members])
        products = stacked @ stacked.T
        shares = _cagrad_shares(products, c)
        told = {m.key: float(share) for m, share in zip(updates.members, shares, strict=True)}
        rate = conflict_rate(products)
        return conclude(updates, shares @ stacked, weights=told, conflict_rate=rate), state

    return Transform("cagrad", dict, update)


def _orders(count: int, updates: Updates) -> Iterator[tuple[int, ...]]:
    if math.factorial(count) <= _ORDERS:
        yield from itertools.permutations(range(count))
        return
    rng = np.random.default_rng([abs(updates.seed), updates.round, zlib.crc32(b"pcgrad")])
    for _ in range(_ORDERS):
        yield tuple(int(index) for index in rng.permutation(count))


def _projected(products: Matrix, order: tuple[int, ...]) -> Matrix:
    """Coefficients (M x M) of every update after removing its conflicting parts in one order of visits."""
    mixing = np.eye(len(products))
    for other in order:
        inner = np.minimum(mixing @ products[:, other], 0.0)
        inner[other] = 0.0
        if products[other, other] > 0:
            mixing[:, other] -= inner / products[other, other]
    return mixing


def _cagrad_shares(products: Matrix, c: float) -> Vector:
    """What CAGrad's direction takes of every update, from their Gram matrix."""
    mean = np.full(len(products), 1.0 / len(products))
    towards = products @ mean
    radius = c * math.sqrt(max(float(mean @ towards), 0.0))
    if radius == 0:
        return mean

    def length(w: Vector) -> float:
        return math.sqrt(max(float(w @ products @ w), 0.0))

    def objective(w: Vector) -> tuple[float, Vector]:
        size = length(w)
        slope = radius / size * (products @ w) if size > 0 else np.zeros_like(w)
        return float(w @ towards + radius * size), towards + slope

    weights = _on_simplex(objective, mean)
    size = length(weights)
    return mean + (radius / size) * weights if size > 0 else mean


def _on_simplex(objective: Callable[[Vector], tuple[float, Vector]], start: Vector) -> Vector:
    """Minimise a convex function, given with its slope, of weights that are not negative and sum to 1."""
    from scipy.optimize import minimize  # half a second, and most runs need none

    scale = abs(objective(start)[0]) or 1.0

    def scaled(w: Vector) -> tuple[float, Vector]:
        value, slope = objective(w)
        return value / scale, slope / scale

    found = minimize(
        scaled,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * len(start),
        constraints={
            "type": "eq",
            "fun": lambda w: float(w.sum()) - 1.0,
            "jac": lambda w: np.ones((1, len(w))),
        },
        options={"ftol": 1e-12, "maxiter": 200},
    )
    weights = np.clip(found.x, 0.0, 1.0)
    return np.asarray(weights / weights.sum())
