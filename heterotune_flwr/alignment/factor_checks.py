"""What the factors of one client must be, and whether two clients of a type tell of the same backbone (numpy only).

Signs, rotations and the cut of principal components are free, so factors are not compared number by number but by what
they read: the whitened latents of one client's texts, as the other's scores and basis give them. Two honest clients
differ by how their processors multiply. On the embedded family at 16, 8 and 4 bits, 6,000 anchors: with another number
of threads by nothing; with other bfloat16 kernels, or in other batches, mean correlations were 0.994 or more and the
relative difference of the latents 0.11 or less. The bounds below are about three times as wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.views import PIECES
from heterotune_flwr.backbones.views import View
from heterotune_flwr.exchange.packing import Tensors

Matrix = NDArray[Any]
#: Least mean correlation, and most relative difference, of whitened latents; most of outputs' rows and of gradients.
_CORRELATION, _DIFFERENCE, _ROWS, _GRADIENTS = 0.95, 0.35, 0.05, 0.3
#: Larger numbers no backbone has.
_LARGEST = 1e8
_SYMBOLS = ("symbols.left", "symbols.singular", "symbols.right")
#: Ridge of the whitening, in mean squared singular values: the order of ``alignment.shrinkage``.
_RIDGE = 0.1


def fault_of(
    factors: Tensors,
    slots: int,
    view: View | None,
    hidden: int,
    labels: int,
    deep: bool,
    symbols: int = 0,
) -> str:
    """What is wrong with a client's factors by themselves; empty where nothing is.

    ``view``: what they are of instead of slots; ``labels``, ``symbols``: rows of label words and of symbols there must
    be; ``deep``: slots below the last have gradients.
    """
    for name, value in factors.items():
        if not np.isfinite(value).all():
            return f"{name} holds numbers that are not finite"
        if value.size and np.abs(value).max() > _LARGEST:
            return f"{name} holds numbers beyond {_LARGEST:g}"
    places = [view.name] if view else [f"slots.{slot}" for slot in range(slots)]
    wanted = [f"{place}.{part}" for place in places for part in ("scores", "basis", "mean")]
    wanted += [] if view else ["label_rows", *(_SYMBOLS if symbols else ())]
    wanted += [f"slots.{slot}.pullback" for slot in range(slots - 1)] if deep and not view else []
    if missing := [name for name in wanted if name not in factors]:
        return f"{missing[0]} is missing"
    known = {*wanted, *(f"slots.{slot}.pullback" for slot in range(slots - 1))}
    if others := sorted(set(factors) - known):
        return f"{others[0]} was not asked for"
    first = factors[f"{places[0]}.scores"]
    rows = len(first) if first.ndim else 0
    for place in places:
        scores, basis, mean = (factors[f"{place}.{part}"] for part in ("scores", "basis", "mean"))
        if scores.ndim != 2 or basis.ndim != 2 or mean.ndim != 1:
            return f"{place} has an impossible shape"
        width = len(mean)
        if (
            scores.shape != (rows, len(basis))
            or basis.shape[1] != width
            or rows < 2
            or not len(basis)
        ):
            return f"{place} has an impossible shape"
        if width not in (hidden, view.parts * hidden if view else hidden):
            return f"{place} is {width} wide, the backbone {hidden}"
        if not scores.std(axis=0).all() or not basis.any(axis=1).all():
            return f"{place} has components that are nothing"
    return "" if view else _fault_of_outputs(factors, slots, hidden, labels, symbols)


def _fault_of_outputs(factors: Tensors, slots: int, hidden: int, labels: int, symbols: int) -> str:
    if factors["label_rows"].shape != (labels, hidden):
        return f"label_rows has the shape {list(factors['label_rows'].shape)}"
    if labels and not factors["label_rows"].any(axis=1).all():
        return "label_rows holds a row of nothing"
    count = 0
    if symbols:
        left, singular, right = (factors[name] for name in _SYMBOLS)
        if singular.ndim != 1 or not (count := len(singular)):
            return "symbols has an impossible shape"
        if left.shape != (symbols, count) or right.shape != (count, hidden):
            return "symbols has an impossible shape"
    for slot in range(slots - 1):
        pulled = factors.get(f"slots.{slot}.pullback")
        if pulled is not None and pulled.shape != (labels + count, hidden):
            return f"slots.{slot}.pullback has the shape {list(pulled.shape)}"
    return ""


def same_backbone(one: Tensors, other: Tensors) -> bool:
    """Whether two clients' factors (both without :func:`fault_of`) tell of the same backbone."""
    if set(one) != set(other):
        return False
    if PIECES in one:
        return np.array_equal(one[PIECES], other[PIECES])
    a, b = ({n: np.asarray(v, np.float64) for n, v in own.items()} for own in (one, other))
    places = sorted(name.removesuffix(".scores") for name in a if name.endswith(".scores"))
    if not all(_same_reading(a, b, place) and _same_reading(b, a, place) for place in places):
        return False
    if "label_rows" in a and not _near(a["label_rows"], b["label_rows"], _ROWS):
        return False
    labels = len(a.get("label_rows", ()))
    if "symbols.left" in a:
        lefts = [own["symbols.left"] * own["symbols.singular"] for own in (a, b)]
        rights = [own["symbols.right"] for own in (a, b)]
        if not _near_products(lefts, rights, _ROWS):
            return False
    for name in (name for name in a if name.endswith(".pullback")):
        if not _near(a[name][:labels], b[name][:labels], _GRADIENTS):
            return False
        if "symbols.left" in a and not _near_products(
            lefts, [a[name][labels:], b[name][labels:]], _GRADIENTS
        ):
            return False
    return True


def _same_reading(a: Mapping[str, Matrix], b: Mapping[str, Matrix], place: str) -> bool:
    """Whether the other one reads, of the same texts and of the same states, the latents that this one has."""
    scores, basis, mean = (a[f"{place}.{part}"] for part in ("scores", "basis", "mean"))
    theirs, their_basis, their_mean = (b[f"{place}.{part}"] for part in ("scores", "basis", "mean"))
    if len(scores) != len(theirs) or mean.shape != their_mean.shape:
        return False
    scores = scores - scores.mean(axis=0)
    theirs = theirs - theirs.mean(axis=0)
    values, vectors = np.linalg.eigh(scores.T @ scores)
    latents = scores @ (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE * values.mean() + 1e-12))
    gram = theirs.T @ theirs
    ridge = 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
    reads = np.linalg.solve(gram + ridge, theirs.T @ latents)
    # The smallest states that give these scores; the basis of a view is scaled, so it is no orthogonal one.
    lengths = basis @ basis.T
    tiny = 1e-12 * np.trace(lengths) / len(basis) * np.eye(len(basis))
    states = scores @ np.linalg.solve(lengths + tiny, basis)
    shifted = (states + (mean - their_mean)) @ (their_basis.T @ reads)
    of_texts, of_states = theirs @ reads, shifted - shifted.mean(axis=0)
    # Where both stand matters to the gate: a mean that is elsewhere shifts every latent.
    spread = float(np.linalg.norm(latents.std(axis=0)))
    offset = float(np.linalg.norm(shifted.mean(axis=0))) / max(spread, 1e-12)
    return bool(
        _correlation(latents, of_texts) >= _CORRELATION
        and _correlation(latents, of_states) >= _CORRELATION
        and _near(latents, of_states, _DIFFERENCE)
        and offset <= 1.0
    )


def _correlation(a: Matrix, b: Matrix) -> float:
    lengths = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return float(np.mean(np.sum(a * b, axis=0) / np.maximum(lengths, 1e-12)))


def _near(a: Matrix, b: Matrix, share: float) -> bool:
    if a.shape != b.shape:
        return False
    return float(np.linalg.norm(a - b)) <= share * float(np.linalg.norm(a)) + 1e-12


def _near_products(lefts: list[Matrix], rights: list[Matrix], share: float) -> bool:
    """The same of ``left @ right``, which is never formed."""
    if lefts[0].shape[0] != lefts[1].shape[0] or rights[0].shape[1] != rights[1].shape[1]:
        return False

    def inner(i: int, j: int) -> float:
        return float(np.sum((lefts[i].T @ lefts[j]) * (rights[i] @ rights[j].T)))

    own = inner(0, 0)
    return max(own + inner(1, 1) - 2 * inner(0, 1), 0.0) <= share**2 * own + 1e-12
