"""Other rules from the literature, in the place of ``deconflict`` and ``combine``, so that CMGA can be compared.

``pcgrad`` changes the types' updates (as ``deconflict`` does); ``cagrad``, ``fedmgda_plus``, ``aligned_mtl`` and
``ties`` combine them into one direction (as ``combine`` does). G below is the M x n matrix of the M types' updates. All
but ``ties`` give a linear combination of the types' updates, computed on their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga.base import Transform, Updates, Vector, gram
from heterotune_flwr.cmga.directions import conclude, deconflict
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State

Matrix = NDArray[np.float64]


def pcgrad(orders: int = 24) -> Transform:
    """PCGrad (arXiv 2001.06782): of two types whose inner product is negative each loses its part along the other.

    ``deconflict`` at threshold 0 without the correction for noise, averaged over orders instead of drawn.

    Parameters
    ----------
    orders
        Most orders that are averaged over. [orders]

    """
    plain = deconflict(0.0, orders)

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        changed, state = plain.update(replace(updates, reliability={}), state)
        return replace(changed, reliability=updates.reliability), state

    return Transform("pcgrad", dict, update)


def cagrad(c: float = 0.5, rescale: bool = True) -> Transform:
    """CAGrad (arXiv 2110.14048): the best worst-type direction within ``c |g0|`` of the mean ``g0``.

    ``d = g0 + sqrt(phi) / |g_w| g_w`` with ``phi = c^2 |g0|^2``, ``g_w = w G`` and w on the simplex minimising
    ``<g_w, g0> + sqrt(phi) |g_w|``.

    Parameters
    ----------
    c
        How far from the mean the direction may lie, in lengths of the mean, in [0, 1). [share]
    rescale
        Whether the step is made as long as the plain weighted mean.

    """
    if not 0 <= c < 1:
        raise ConfigError(f"cagrad.c is {c}, it must be in [0, 1)")

    def coefficients(products: Matrix) -> Vector:
        count = len(products)
        mean = np.full(count, 1.0 / count)
        towards = products @ mean
        radius = c * np.sqrt(max(float(mean @ towards), 0.0))
        if radius == 0:
            return mean

        def objective(w: Vector) -> float:
            return float(w @ towards + radius * np.sqrt(max(float(w @ products @ w), 0.0)))

        weights = _on_simplex(objective, mean)
        length = np.sqrt(max(float(weights @ products @ weights), 0.0))
        return mean + (radius / length) * weights if length > 0 else mean

    return _linear("cagrad", coefficients, rescale)


def fedmgda_plus(epsilon: float = 1.0, rescale: bool = True) -> Transform:
    """FedMGDA+ (arXiv 2006.11489): shortest convex combination of *unit* updates.

    No weight is further than ``epsilon`` from equal.
    ``epsilon = 1`` is MGDA on unit updates, 0 their plain mean. Applied to types where the paper has clients.

    Parameters
    ----------
    epsilon
        Furthest that a weight may lie from equal, 0 to 1. [share]
    rescale
        Whether the step is made as long as the plain weighted mean.

    """
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"fedmgda_plus.epsilon is {epsilon}, it must be in [0, 1]")

    def coefficients(products: Matrix) -> Vector:
        norms = np.sqrt(np.maximum(np.diag(products), 0.0))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        unit = products * np.outer(inverse, inverse)
        equal = np.full(len(products), 1.0 / len(products))
        bounds = [(max(0.0, e - epsilon), min(1.0, e + epsilon)) for e in equal]
        return _on_simplex(lambda w: float(w @ unit @ w), equal, bounds) * inverse

    return _linear("fedmgda_plus", coefficients, rescale)


def aligned_mtl(rescale: bool = True) -> Transform:
    """Aligned-MTL (arXiv 2305.19000): rotate and scale the updates until their Gram matrix is ``sigma_min^2 I``.

    With ``G G' = V diag(lambda) V'``: ``d = sqrt(lambda_min) sum_m w_m (V diag(lambda)^-1/2 V' G)_m``, equal w,
    lambda_min the smallest eigenvalue that is not zero.

    Parameters
    ----------
    rescale
        Whether the step is made as long as the plain weighted mean.

    """

    def coefficients(products: Matrix) -> Vector:
        values, vectors = np.linalg.eigh(products)
        kept = values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
        if not kept.any():
            return np.full(len(products), 1.0 / len(products))
        scaled = np.zeros_like(values)
        scaled[kept] = np.sqrt(values[kept].min() / values[kept])
        equal = np.full(len(products), 1.0 / len(products))
        return np.asarray(equal @ (vectors * scaled) @ vectors.T)

    return _linear("aligned_mtl", coefficients, rescale)


def ties(density: float = 0.2, rescale: bool = True) -> Transform:
    """TIES (arXiv 2306.01708): trim to the largest ``density``, elect a sign per number, average those who agree.

    Parameters
    ----------
    density
        How many of an update's numbers are kept, the largest, in (0, 1]. [share]
    rescale
        Whether the step is made as long as the plain weighted mean.

    """
    if not 0 < density <= 1:
        raise ConfigError(f"ties.density is {density}, it must be in (0, 1]")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        stacked = np.stack([member.vector for member in updates.members])
        kept = max(1, round(density * stacked.shape[1]))
        threshold = np.partition(np.abs(stacked), -kept, axis=1)[:, -kept, None]
        trimmed = np.where(np.abs(stacked) >= threshold, stacked, 0.0)
        agree = trimmed * np.sign(trimmed.sum(axis=0)) > 0
        direction = np.where(agree, trimmed, 0.0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        return conclude(updates, direction, rescale, updates.logged()), state

    return Transform("ties", dict, update)


def _linear(name: str, coefficients: Callable[[Matrix], Vector], rescale: bool) -> Transform:
    """A rule whose direction is ``coefficients(G G') G``."""

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        found = coefficients(gram(updates.members))
        direction = found @ np.stack([member.vector for member in updates.members])
        shares = {m.key: float(share) for m, share in zip(updates.members, found, strict=True)}
        return conclude(updates, direction, rescale, updates.logged(coefficients=shares)), state

    return Transform(name, dict, update)


def _on_simplex(
    objective: Callable[[Vector], float],
    start: Vector,
    bounds: list[tuple[float, float]] | None = None,
) -> Vector:
    """Minimise a convex function of a few weights that are not negative and sum to 1."""
    from scipy.optimize import minimize

    scale = abs(objective(start)) or 1.0
    found = minimize(
        lambda w: objective(w) / scale,
        start,
        method="SLSQP",
        bounds=bounds or [(0.0, 1.0)] * len(start),
        constraints={"type": "eq", "fun": lambda w: float(w.sum()) - 1.0},
        options={"ftol": 1e-12, "maxiter": 200},
    )
    weights = np.clip(found.x, 0.0, 1.0)
    return np.asarray(weights / weights.sum())
