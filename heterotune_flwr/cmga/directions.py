"""The second half of the chain: from one update per type to one step.

Every direction here is a linear combination of the types' updates, so all of it is computed on
their Gram matrix (M x M for M types); the long vectors are touched once, at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga.base import (
    Member,
    Transform,
    Updates,
    Vector,
    cosines,
    generator,
    gram,
    pairwise,
)
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State

Matrix = NDArray[np.float64]
#: Cosines above minus this count as not negative.
_TOLERANCE = 1e-9


def _orders(count: int, limit: int, updates: Updates) -> Iterator[tuple[int, ...]]:
    """All orders of ``count`` types, or ``limit`` random ones where there are more."""
    if math.factorial(count) <= limit:
        yield from itertools.permutations(range(count))
        return
    rng = generator(updates, "deconflict")
    for _ in range(limit):
        yield tuple(int(index) for index in rng.permutation(count))


def _project(
    start: int, order: tuple[int, ...], products: Matrix, discount: Matrix, threshold: float
) -> Matrix:
    """PCGrad step for one type: coefficients of its update after removing conflicting parts."""
    coefficients = np.zeros(len(products))
    coefficients[start] = 1.0
    for other in order:
        if other == start or products[other, other] <= 0:
            continue
        inner = float(coefficients @ products[other])
        length = math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))
        scale = length * math.sqrt(products[other, other])
        if scale > 0 and inner / scale < threshold * discount[start, other]:
            coefficients[other] -= inner / products[other, other]
    return coefficients


def deconflict(threshold: float = -0.1, orders: int = 24) -> Transform:
    """Remove from each type's update what points against another type's (docs/method.md, 4.4).

    Two types conflict where ``cos(g_a, g_b) / sqrt(rel_a rel_b) < threshold``: the division undoes
    what noise takes off a cosine. There the component along ``g_b`` is removed from ``g_a``
    (PCGrad, arXiv 2001.06782), averaged over the orders in which the others are visited.

    Parameters
    ----------
    threshold
        Corrected cosine below which two types conflict, not above 0. [cosine]
    orders
        Most orders that are averaged over. [orders]

    """
    if threshold > 0:
        raise ConfigError(f"deconflict.threshold is {threshold}; it must not be above 0")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        members, count = updates.members, len(updates.members)
        names = [member.key for member in members]
        products = gram(members)
        before = cosines(products)
        reliability = np.array([updates.reliability.get(name, 1.0) for name in names])
        discount = np.sqrt(np.outer(reliability, reliability))
        conflict = (before < threshold * discount) & ~np.eye(count, dtype=bool)
        mixing = np.eye(count)
        if conflict.any():
            chosen = list(_orders(count, orders, updates))
            mixing = np.stack(
                [
                    np.mean([_project(a, o, products, discount, threshold) for o in chosen], axis=0)
                    for a in range(count)
                ]
            )
        stacked = mixing @ np.stack([member.vector for member in members])
        pairs = max(count * (count - 1), 1)
        log = updates.logged(
            cosine_before=pairwise(names, before),
            cosine_after=pairwise(names, cosines(mixing @ products @ mixing.T)),
            conflict_rate=float(conflict.sum()) / pairs,
        )
        changed = tuple(replace(m, vector=v) for m, v in zip(members, stacked, strict=True))
        return replace(updates, members=changed, log=log), state

    return Transform("deconflict", dict, update)


def min_norm_weights(products: Matrix) -> Matrix:
    """Weights (sum 1, none negative) of the shortest convex combination, from a Gram matrix.

    The shortest point d of the convex hull has ``<d, g_m> >= |d|^2`` for every m: it is a descent
    direction for all types at once, or zero when there is none (MGDA, arXiv 1810.04650). Solved
    exactly as non-negative least squares: min |G u|^2 + (1'u - 1)^2 has its solution on the ray of
    the minimiser.
    """
    scale = float(np.trace(products))
    if scale <= 0:
        return np.full(len(products), 1.0 / len(products))
    from scipy.optimize import nnls  # half a second, and most runs need none

    values, vectors = np.linalg.eigh(products / scale)
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    system = np.vstack([root, np.ones(len(products))])
    solution, _ = nnls(system, np.append(np.zeros(len(products)), 1.0))
    return np.asarray(solution / solution.sum())


def _guarded(direction: Vector, types: tuple[Member, ...]) -> tuple[Vector, float]:
    """Blend towards the shortest point of the types' hull until no inner product is negative.

    Returns the new direction and the blend in [0, 1]; 0 where nothing had to be done.
    """
    lengths = {member.key: float(np.linalg.norm(member.vector)) for member in types}
    units = [m.vector / lengths[m.key] for m in types if lengths[m.key] > 0]
    if not units:
        return direction, 0.0
    stacked = np.stack(units)
    now = stacked @ direction
    size = float(np.linalg.norm(direction))
    if now.min() >= -_TOLERANCE * size:
        return direction, 0.0
    safe = min_norm_weights(stacked @ stacked.T) @ stacked
    length = float(np.linalg.norm(safe))
    if length < _TOLERANCE:
        return np.zeros_like(direction), 1.0
    safe = safe * (size / length)
    then = stacked @ safe
    needed = [-a / (b - a) for a, b in zip(now, then, strict=True) if a < 0 and b > a]
    blend = min(max(needed, default=0.0), 1.0)
    return (1 - blend) * direction + blend * safe, blend


def combine(weights: str = "reliability", rescale: bool = True, guard: bool = True) -> Transform:
    """``d = sum_m w_m g^_m``, as long as the plain weighted mean (docs/method.md, 4.5).

    The guard moves d towards the shortest point of the convex hull of the types' unit updates, by the smallest blend
    that achieves ``<d, g_m> >= 0`` (up to rounding). Where the types leave no common descent direction at all (exactly
    opposite updates), nothing is applied. Neither a plain average nor PCGrad with three or more types gives such a
    guarantee; a momentum or Adam server step after it does not keep it for the round's own updates.

    Parameters
    ----------
    weights
        ``reliability`` (equal where ``weigh_reliability`` is not in the chain), ``equal`` or
        ``examples`` (with ``rescale`` off and no other step: plain averaging).
    rescale
        Give d the norm of the plain example-weighted mean of the clients' raw updates, so that no
        rule wins by a hidden learning rate.
    guard
        Whether no type is worked against: after this step ``<d, g_m> >= 0`` for *every* type, g_m being the type's mean
        before any other transform.

    """
    if weights not in {"reliability", "equal", "examples"}:
        raise ConfigError(f"combine.weights is {weights!r}; choose reliability, equal or examples")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        members = updates.members
        shares = {member.key: 1.0 for member in members}
        if weights == "examples":
            shares = {member.key: member.examples for member in members}
        elif weights == "reliability" and updates.weights:
            shares = dict(updates.weights)
        coefficients = np.array([shares[member.key] for member in members])
        coefficients = coefficients / coefficients.sum()
        direction = coefficients @ np.stack([member.vector for member in members])
        used = zip((member.key for member in members), coefficients.tolist(), strict=True)
        log = updates.logged(weights=dict(used))
        if guard and len(members) > 1:
            direction, log["guard_blend"] = _guarded(direction, updates.types)
        return conclude(updates, direction, rescale, log), state

    return Transform("combine", dict, update)


def server_opt(
    kind: str = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Transform:
    """Server optimizer on the combined direction (docs/method.md, 4.6): :class:`.ServerOptimizer`."""
    optimizer = ServerOptimizer(kind, learning_rate, momentum, beta2, tau)

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        step, new = optimizer.step(updates.direction, state)
        return replace(updates, members=(replace(updates.members[0], vector=step),)), new

    return Transform("server_opt", dict, update)


def conclude(updates: Updates, direction: Vector, rescale: bool, log: dict[str, Any]) -> Updates:
    """The one combined member, as long as the plain weighted mean where ``rescale`` says so.

    Logged: the cosines between the types' updates before any other step, and of the direction with each of them.
    """
    names = [member.key for member in updates.types]
    stacked = np.stack([*(member.vector for member in updates.types), direction])
    found = cosines(stacked @ stacked.T)
    log = {
        "cosine_before": pairwise(names, found[:-1, :-1]),
        **log,
        "agreement": dict(zip(names, found[-1, :-1].tolist(), strict=True)),
    }
    if rescale:
        norm = float(np.linalg.norm(direction))
        target = float(np.linalg.norm(updates.reference))
        direction = direction * (target / norm if norm > 0 else 0.0)
    total = sum(member.examples for member in updates.members)
    combined = Member("combined", "combined", direction, total)
    return replace(updates, members=(combined,), log=log)
