"""MAXVAR generalised canonical correlation from principal-component scores (numpy only).

MAXVAR GCCA (Kettenring 1971, https://doi.org/10.1093/biomet/58.3.433) looks for latents Z (n x r, orthogonal
columns) that every type's states explain best::

    max_Z  sum_m tr(Z' P_m Z),     P_m = X_m (X_m' X_m + n k_m I)^-1 X_m'

With the singular value decomposition of the centred states, ``X_m V_m = T_m`` (scores, n x p) and
``P_m = B_m B_m'`` for ``B_m = T_m / sqrt(s^2 + k)``; Z is then given by the leading left singular vectors of
``[B_1 ... B_M]``. The shrinkage ``k`` (relative to the mean squared singular value) is the one with the highest
correlation of the types' latents on held-out anchors. No type is the pivot.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ConfigError

Matrix = NDArray[Any]
HELD_OUT = 0.2


@dataclass(frozen=True)
class SlotFit:
    """Shared latents of one slot and how every type reaches them.

    Attributes
    ----------
    latents
        Z, n x r, columns of variance one.
    coefficients
        Type -> p_m x r: latents from principal-component scores, scaled to variance one times the weights.
    quality
        Type -> mean held-out correlation of its latents with the other types' (1 for a single type).
    weights
        r numbers of mean square one, the same for every type: how much each latent counts.
    shrinkage
        The chosen k.

    """

    latents: Matrix
    coefficients: dict[str, Matrix]
    quality: dict[str, float]
    weights: Matrix
    shrinkage: float


def _centre(scores: Matrix) -> Matrix:
    scores = np.asarray(scores, dtype=np.float64)
    return scores - scores.mean(axis=0)


def _ridge_constant(scores: Matrix, shrinkage: float) -> float:
    return float(shrinkage * np.mean(np.sum(scores**2, axis=0)) + 1e-12)


def shared_latents(scores: Mapping[str, Matrix], rank: int, shrinkage: float) -> Matrix:
    """Z (n x rank), columns with mean square one.

    Raises
    ------
    ConfigError
        The types have fewer components together, or fewer anchors, than ``rank``.

    """
    blocks = []
    for key in sorted(scores):
        centred = _centre(scores[key])
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        k = _ridge_constant(centred, shrinkage)
        blocks.append(left * (singular / np.sqrt(singular**2 + k)))
    stacked = np.concatenate(blocks, axis=1)
    if rank > min(stacked.shape):
        raise ConfigError(
            f"method.latent is {rank}, but the types' states have only {min(stacked.shape)} components on the "
            "anchors together; lower method.latent or raise alignment.components and alignment.count"
        )
    left, _, right = np.linalg.svd(stacked, full_matrices=False)
    # The sign of a singular vector is arbitrary: fix it, so that equal input gives equal maps.
    signs = np.sign(right[np.arange(rank), np.abs(right[:rank]).argmax(axis=1)])
    latents: Matrix = left[:, :rank] * signs * np.sqrt(len(stacked))
    return latents


def ridge(scores: Matrix, latents: Matrix, shrinkage: float) -> Matrix:
    """Coefficients (p x r) of the ridge regression scores -> latents."""
    centred = _centre(scores)
    k = _ridge_constant(centred, shrinkage)
    gram = centred.T @ centred + k * np.eye(centred.shape[1])
    solution: Matrix = np.linalg.solve(gram, centred.T @ latents)
    return solution


def unit_variance(scores: Matrix, coefficients: Matrix) -> Matrix:
    """Coefficients scaled so that every latent has variance one on the anchors."""
    spread = (_centre(scores) @ coefficients).std(axis=0)
    scaled: Matrix = coefficients / np.maximum(spread, 1e-12)
    return scaled


def _correlation(a: Matrix, b: Matrix) -> Matrix:
    """Pearson correlation per column."""
    a, b = _centre(a), _centre(b)
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    result: Matrix = np.sum(a * b, axis=0) / np.maximum(norms, 1e-12)
    return result


def held_out_quality(
    scores: Mapping[str, Matrix], rank: int, shrinkage: float, seed: int = 0
) -> dict[str, Matrix]:
    """Per type and latent: correlation with the other types' latents on anchors not used for the fit."""
    keys = sorted(scores)
    count = len(scores[keys[0]])
    if len(keys) == 1:
        return {keys[0]: np.ones(rank)}
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(count * (1 - HELD_OUT)))
    fit, test = order[:cut], order[cut:]
    train = {key: np.asarray(scores[key], dtype=np.float64)[fit] for key in keys}
    latents = shared_latents(train, rank, shrinkage)
    reached = {
        key: (np.asarray(scores[key], dtype=np.float64)[test] - train[key].mean(axis=0))
        @ ridge(train[key], latents, shrinkage)
        for key in keys
    }
    pairs = {
        pair: _correlation(reached[pair[0]], reached[pair[1]])
        for pair in itertools.combinations(keys, 2)
    }
    return {
        key: np.mean([value for pair, value in pairs.items() if key in pair], axis=0)
        for key in keys
    }


def latent_weights(quality: Mapping[str, Matrix], exponent: float) -> Matrix:
    """Weights ``rho ** exponent`` with mean square one, from the held-out correlations rho per latent.

    A latent that another model reads differently carries noise across types: it counts less. Exponent 0 weighs
    all latents equally.
    """
    rho = np.clip(np.mean(list(quality.values()), axis=0), 0.02, 1.0)
    weights = rho**exponent
    scaled: Matrix = weights / np.sqrt(np.mean(weights**2))
    return scaled


def fit_slot(
    scores: Mapping[str, Matrix],
    rank: int,
    candidates: Sequence[float],
    weighting: float = 0.0,
    seed: int = 0,
) -> SlotFit:
    """Align one slot: choose the shrinkage on held-out anchors, then fit on all.

    Parameters
    ----------
    scores
        Type -> n x p_m principal-component scores of the states at the slot, same anchors in the same order.
    rank
        r, width of the shared latent space.
    candidates
        Shrinkage constants to choose from.
    weighting
        Exponent of :func:`latent_weights`.
    seed
        Which anchors are held out.

    Raises
    ------
    ConfigError
        The types saw different numbers of anchors, or ``rank`` is too large.

    """
    counts = {key: len(value) for key, value in scores.items()}
    if len(set(counts.values())) != 1:
        raise ConfigError(f"the types were aligned on different numbers of anchors: {counts}")
    qualities = {k: held_out_quality(scores, rank, k, seed) for k in candidates}
    best = max(candidates, key=lambda k: float(np.mean(list(qualities[k].values()))))
    weights = latent_weights(qualities[best], weighting)
    latents = shared_latents(scores, rank, best)
    coefficients = {
        key: unit_variance(value, ridge(value, latents, best)) * weights
        for key, value in scores.items()
    }
    quality = {key: float(np.mean(value)) for key, value in qualities[best].items()}
    return SlotFit(latents, coefficients, quality, weights, float(best))
