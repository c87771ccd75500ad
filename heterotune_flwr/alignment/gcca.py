"""MAXVAR generalised canonical correlation from principal-component scores (numpy only).

MAXVAR GCCA (Kettenring 1971, https://doi.org/10.1093/biomet/58.3.433) looks for latents Z (n x r, orthogonal
columns) that every type's states explain best::

    max_Z  sum_m tr(Z' P_m Z),     P_m = X_m (X_m' X_m + n k_m I)^-1 X_m'

With the singular value decomposition of the centred states, ``X_m V_m = T_m`` (scores, n x p) and
``P_m = B_m B_m'`` for ``B_m = T_m (T_m' T_m + k)^-1/2``; Z is then given by the leading left singular vectors of
``[B_1 ... B_M]``, found in the small space of components (second moments only, an eigenvalue problem of size
``sum p_m``). The shrinkage ``k`` (relative to the mean squared singular value) is the one with the highest
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
    centred: Matrix = np.asarray(scores, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    return centred


def _ridge_constant(gram: Matrix, shrinkage: float) -> float:
    """``shrinkage`` in units of the mean squared singular value."""
    return float(shrinkage * np.trace(gram) / len(gram) + 1e-12)


@dataclass(frozen=True)
class _Moments:
    """All second moments of the types' scores: everything below needs no more than these.

    ``gram`` is P x P for the P = sum of p_m columns of all types side by side; ``parts`` says which are whose.
    The anchors are gone through once, however many shrinkages are tried.
    """

    gram: Matrix
    parts: dict[str, slice]
    count: int

    @classmethod
    def of(cls, centred: Mapping[str, Matrix]) -> _Moments:
        joined = np.concatenate([centred[key] for key in sorted(centred)], axis=1)
        parts, start = {}, 0
        for key in sorted(centred):
            parts[key] = slice(start, start + centred[key].shape[1])
            start = parts[key].stop
        return cls(joined.T @ joined, parts, len(joined))

    def leading(self, rank: int, shrinkage: float) -> Matrix:
        """Coefficients (P x rank) that give Z from the types' centred scores side by side."""
        if rank > min(self.count - 1, len(self.gram)):
            raise ConfigError(
                f"method.latent is {rank}, but the types' states have only "
                f"{min(self.count - 1, len(self.gram))} components on the anchors together; lower method.latent or "
                "raise alignment.components and alignment.count"
            )
        whiten = np.zeros_like(self.gram)
        for part in self.parts.values():
            own = self.gram[part, part]
            values, vectors = np.linalg.eigh(own)
            roots = np.sqrt(np.maximum(values, 0) + _ridge_constant(own, shrinkage))
            whiten[part, part] = (vectors / roots) @ vectors.T
        values, vectors = np.linalg.eigh(whiten @ self.gram @ whiten)
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        # The sign of an eigenvector is arbitrary: fix it, so that equal input gives equal maps.
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)])
        scale = signs * np.sqrt(self.count / np.maximum(values, 1e-12))
        coefficients: Matrix = whiten @ vectors * scale
        return coefficients

    def ridge(self, key: str, leading: Matrix, shrinkage: float) -> Matrix:
        """Coefficients (p x rank) of one type's ridge regression onto Z."""
        part = self.parts[key]
        own = self.gram[part, part]
        k = _ridge_constant(own, shrinkage)
        solution: Matrix = np.linalg.solve(own + k * np.eye(len(own)), self.gram[part] @ leading)
        return solution


def shared_latents(scores: Mapping[str, Matrix], rank: int, shrinkage: float) -> Matrix:
    """Z (n x rank), columns with mean square one.

    Raises
    ------
    ConfigError
        The types have fewer components together, or fewer anchors, than ``rank``.

    """
    centred = {key: _centre(value) for key, value in scores.items()}
    leading = _Moments.of(centred).leading(rank, shrinkage)
    joined = np.concatenate([centred[key] for key in sorted(centred)], axis=1)
    latents: Matrix = joined @ leading
    return latents


def ridge(scores: Matrix, latents: Matrix, shrinkage: float) -> Matrix:
    """Coefficients (p x r) of the ridge regression scores -> latents."""
    centred = _centre(scores)
    gram = centred.T @ centred
    k = _ridge_constant(gram, shrinkage)
    solution: Matrix = np.linalg.solve(gram + k * np.eye(len(gram)), centred.T @ latents)
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
    scores: Mapping[str, Matrix], rank: int, candidates: Sequence[float], seed: int = 0
) -> dict[float, dict[str, Matrix]]:
    """Per shrinkage, type and latent: correlation with the other types' latents on unseen anchors."""
    keys = sorted(scores)
    if len(keys) == 1:
        return {k: {keys[0]: np.ones(rank)} for k in candidates}
    count = len(scores[keys[0]])
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(count * (1 - HELD_OUT)))
    fit, test = order[:cut], order[cut:]
    centred = {key: _centre(np.asarray(scores[key])[fit]) for key in keys}
    unseen = {key: np.asarray(scores[key], dtype=np.float64)[test] for key in keys}
    moments = _Moments.of(centred)
    found: dict[float, dict[str, Matrix]] = {}
    for k in candidates:
        leading = moments.leading(rank, k)
        reached = {key: unseen[key] @ moments.ridge(key, leading, k) for key in keys}
        pairs = {
            pair: _correlation(reached[pair[0]], reached[pair[1]])
            for pair in itertools.combinations(keys, 2)
        }
        found[k] = {
            key: np.mean([value for pair, value in pairs.items() if key in pair], axis=0)
            for key in keys
        }
    return found


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
    qualities = held_out_quality(scores, rank, candidates, seed)
    best = max(candidates, key=lambda k: float(np.mean(list(qualities[k].values()))))
    weights = latent_weights(qualities[best], weighting)
    centred = {key: _centre(value) for key, value in scores.items()}
    moments = _Moments.of(centred)
    leading = moments.leading(rank, best)
    latents = np.concatenate([centred[key] for key in sorted(centred)], axis=1) @ leading
    coefficients = {
        key: unit_variance(value, moments.ridge(key, leading, best)) * weights
        for key, value in scores.items()
    }
    quality = {key: float(np.mean(value)) for key, value in qualities[best].items()}
    return SlotFit(latents, coefficients, quality, weights, float(best))
