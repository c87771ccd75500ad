"""Output maps U, aligned by *effect*: the same output latent raises the same words in every model (our definition).

``labels``
    an output latent moves the label words' logits, of words with similar meaning together: ``W_labels U = F`` with
    ``F = (mean over types of the label rows' normalised Gram matrices)^(1/2)`` (C columns). Measured against
    ``F = I``: better for shared and for lonely training alike (docs/history.md).
``vocabulary``
    ``W U = F`` by ridge over the symbols all vocabularies share; F (V x r) are the leading left singular vectors
    of the models' concatenated left singular vectors, scaled so that one unit moves a word's logit by
    one on (quadratic) average.

At deeper slots ``W`` is replaced by its average gradient with respect to the slot's output (pull-back).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from heterotune_flwr.alignment.gcca import Matrix
from heterotune_flwr.errors import ConfigError

#: Ridge of the output maps, relative to the mean eigenvalue of the Gram matrix.
LAST_RIDGE, DEEP_RIDGE = 1e-6, 1e-2
Factors = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.floating]]"]


def _ridge_pseudo_inverse(rows: Matrix, strength: float) -> Matrix:
    """``rows' (rows rows' + k I)^-1``: k x d -> d x k."""
    gram = rows @ rows.T
    k = strength * float(np.trace(gram)) / len(gram) + 1e-12
    inverse: Matrix = np.linalg.solve(gram + k * np.eye(len(gram)), rows).T
    return inverse


def vocabulary_functionals(factors: Mapping[str, Factors], rank: int) -> Matrix:
    """F (V x rank): what the types' unembeddings span together over the symbols."""
    stacked = np.concatenate(
        [np.asarray(factors[key]["symbols.left"], dtype=np.float64) for key in sorted(factors)],
        axis=1,
    )
    if rank > min(stacked.shape):
        raise ConfigError(
            f"method.output is {rank}, but the shared vocabulary offers {min(stacked.shape)} functionals; lower it "
            "(or method.latent), or raise alignment.output_components and alignment.symbols"
        )
    left, _, right = np.linalg.svd(stacked, full_matrices=False)
    signs = np.sign(right[np.arange(rank), np.abs(right[:rank]).argmax(axis=1)])
    functionals: Matrix = left[:, :rank] * signs * np.sqrt(len(stacked))
    return functionals


def label_functionals(factors: Mapping[str, Factors], geometry: bool = True) -> Matrix:
    """F (C x C): the types' common geometry of the label words, of the size of the identity (or the identity).

    A softmax does not see what all labels have in common, so the mean row is taken out first.
    """
    if not geometry:
        identity: Matrix = np.eye(len(next(iter(factors.values()))["label_rows"]))
        return identity
    grams = []
    for key in sorted(factors):
        rows = np.asarray(factors[key]["label_rows"], dtype=np.float64)
        centred = rows - rows.mean(axis=0)
        gram = centred @ centred.T
        grams.append(gram * (len(gram) / max(float(np.trace(gram)), 1e-12)))
    values, vectors = np.linalg.eigh(np.mean(grams, axis=0))
    root: Matrix = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return root


@dataclass(frozen=True)
class Functionals:
    """What one unit of an output latent does: to the labels (C x C) or to the symbols (V x r_out)."""

    kind: str
    values: Matrix

    @classmethod
    def known(cls, latents: Mapping[str, Matrix]) -> Functionals:
        """The functionals of an earlier alignment."""
        if "functionals" in latents:
            return cls("vocabulary", latents["functionals"])
        return cls("labels", latents["label_functionals"])


def last_output_map(own: Factors, wanted_effect: Functionals) -> Matrix:
    """U (d x r_out) of the last slot."""
    functionals = wanted_effect.values
    if wanted_effect.kind == "labels":
        rows = np.asarray(own["label_rows"], dtype=np.float64)
        inverse: Matrix = _ridge_pseudo_inverse(rows, LAST_RIDGE) @ functionals
        return inverse
    left = np.asarray(own["symbols.left"], dtype=np.float64)
    singular = np.asarray(own["symbols.singular"], dtype=np.float64)
    right = np.asarray(own["symbols.right"], dtype=np.float64)
    k = LAST_RIDGE * float(np.mean(singular**2)) + 1e-12
    output = right.T @ ((singular / (singular**2 + k))[:, None] * (left.T @ functionals))
    reached = (left * singular) @ (right @ output)
    wanted = float(np.linalg.norm(functionals))
    # gamma: the part of F a model can reach differs; the size of the effect must not.
    scaled: Matrix = output * (wanted / max(float(np.linalg.norm(reached)), 1e-12))
    return scaled


def deep_output_map(own: Factors, slot: int, wanted_effect: Functionals) -> Matrix:
    """U (d x r_out) of a slot below the last, from the pulled-back functionals."""
    pulled = np.asarray(own[f"slots.{slot}.pullback"], dtype=np.float64)
    labels, functionals = len(own["label_rows"]), wanted_effect.values
    if wanted_effect.kind == "labels":
        output: Matrix = _ridge_pseudo_inverse(pulled[:labels], DEEP_RIDGE) @ functionals
        return output
    left = np.asarray(own["symbols.left"], dtype=np.float64)
    singular = np.asarray(own["symbols.singular"], dtype=np.float64)
    rows = (functionals.T @ (left * singular)) @ pulled[labels:] / len(functionals)
    return _ridge_pseudo_inverse(rows, DEEP_RIDGE)
