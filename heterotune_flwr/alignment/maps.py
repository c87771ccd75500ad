"""From the types' public factors to their frozen maps D, o, U (numpy only; our definition).

Input maps come from :mod:`.gcca` (same latents for the same text), output maps from :mod:`.functionals` (same effect).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from heterotune_flwr.alignment.functionals import (
    Factors,
    Functionals,
    deep_output_map,
    label_functionals,
    last_output_map,
    vocabulary_functionals,
)
from heterotune_flwr.alignment.gcca import Matrix, SlotFit, fit_slot, ridge, unit_variance
from heterotune_flwr.alignment.views import places_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.schema import AlignmentConfig, MethodConfig
from heterotune_flwr.seeds import generator

#: Quality of a type whose factors nobody vouches for: it shares nothing, whatever ``alignment.quality_threshold`` is.
APART = -1.0


@dataclass(frozen=True)
class AlignmentResult:
    """Frozen maps of every type and what a later type needs to join.

    Attributes
    ----------
    maps
        Type -> canonical map name -> float32 array.
    quality
        Type -> held-out canonical correlation per slot, then of whole texts where they are aligned.
    shrinkage
        Chosen shrinkage, likewise.
    output_width
        r_out.
    anchor_latents
        ``slots.{k}.latents`` (n x r), ``slots.{k}.weights`` (r), ``text.`` likewise, and the functionals of the
        outputs: ``label_functionals`` (C x C) or ``functionals`` (V x r_out).

    """

    maps: dict[str, Tensors]
    quality: dict[str, list[float]]
    shrinkage: list[float]
    output_width: int
    anchor_latents: dict[str, Matrix] = field(default_factory=dict)


def _type_maps(
    own: Factors, slots: int, coefficients: Mapping[str, Matrix], functionals: Functionals
) -> dict[str, Matrix]:
    """The canonical maps of one type; ``coefficients`` by place."""
    maps: dict[str, Matrix] = {}
    for place, found in coefficients.items():
        basis = np.asarray(own[f"{place}.basis"], dtype=np.float64)
        mean = np.asarray(own[f"{place}.mean"], dtype=np.float64)
        scores = np.asarray(own[f"{place}.scores"], dtype=np.float64)
        down = found.T @ basis
        maps[f"{place}.map.down.weight"] = down
        maps[f"{place}.map.down.bias"] = -(down @ mean) - scores.mean(axis=0) @ found
    for slot in range(slots):
        last = slot == slots - 1
        maps[f"slots.{slot}.map.up.weight"] = (
            last_output_map(own, functionals) if last else deep_output_map(own, slot, functionals)
        )
    return maps


def _output_width(
    alignment: AlignmentConfig, method: MethodConfig, labels: Sequence[str] | None
) -> int:
    if alignment.output == "labels":
        if not labels:
            raise ConfigError(
                "alignment.output is 'labels', but the task has no closed label set; use 'vocabulary'"
            )
        if method.output not in (None, len(labels)):
            raise ConfigError(
                f"method.output is {method.output}, but alignment.output=labels needs {len(labels)} (or null)"
            )
        return len(labels)
    return method.output or method.latent


def compute_maps(
    factors: Mapping[str, Factors],
    alignment: AlignmentConfig,
    method: MethodConfig,
    labels: Sequence[str] | None,
    seed: int = 0,
    apart: Collection[str] = (),
) -> AlignmentResult:
    """Align all types at once.

    Those ``apart``, and of three or more those whose latents hardly correlate with the others', have no say in what the
    latents are: they are fitted to the others' (:func:`join_type`), so that their factors can spoil nobody else's maps.

    Parameters
    ----------
    factors
        Type -> what :func:`.factors.alignment_factors` returned there.
    alignment, method
        The run's sections.
    labels
        Closed label set, None for open text.
    seed
        For the held-out split and the controls' random draws.
    apart
        Types whose factors nobody vouches for; they share nothing (quality :data:`APART`).

    Raises
    ------
    ConfigError
        Widths that the anchors or vocabularies cannot support.

    """
    width = _output_width(alignment, method, labels)
    fits = _fit_core(factors, alignment, method, seed, apart)
    core = {key: factors[key] for key in next(iter(fits.values())).quality}
    known: dict[str, Matrix] = (
        {"label_functionals": label_functionals(core, alignment.label_geometry)}
        if alignment.output == "labels"
        else {"functionals": vocabulary_functionals(core, width)}
    )
    coefficients: dict[str, dict[str, Matrix]] = {key: {} for key in factors}
    quality: dict[str, list[float]] = {key: [] for key in factors}
    for place, fit in fits.items():
        known[f"{place}.latents"], known[f"{place}.weights"] = fit.latents, fit.weights
        for key, own in factors.items():
            if key in core:
                found, reached = fit.coefficients[key], fit.quality[key]
            else:
                found, reached = _joined(own, place, fit.latents, fit.weights, fit.shrinkage)
            coefficients[key][place] = found
            quality[key].append(APART if key in apart else round(reached, 4))
    shrinkage = [fit.shrinkage for fit in fits.values()]
    maps = {
        key: _type_maps(own, method.slots, coefficients[key], Functionals.known(known))
        for key, own in factors.items()
    }
    weights = {place: known[f"{place}.weights"] for place in places_of(method)}
    maps = apply_control(maps, factors, alignment.control, weights, seed)
    return AlignmentResult(
        maps={key: {name: value.astype(np.float32) for name, value in own.items()}
              for key, own in maps.items()},
        quality=quality,
        shrinkage=shrinkage,
        output_width=width,
        anchor_latents=known,
    )  # fmt: skip


def join_type(
    result: AlignmentResult, own: Factors, method: MethodConfig
) -> tuple[Tensors, list[float]]:
    """Maps of a type that appears later, by ridge onto the known latents; nothing else changes.

    Returns
    -------
    The type's maps (it can use the trained bank at once, without any training of its own) and, per place, the
    correlation of its latents with the known ones on a fifth of the anchors held out from the ridge.

    """
    coefficients: dict[str, Matrix] = {}
    quality: list[float] = []
    for index, place in enumerate(places_of(method)):
        coefficients[place], reached = _joined(
            own,
            place,
            result.anchor_latents[f"{place}.latents"],
            result.anchor_latents[f"{place}.weights"],
            result.shrinkage[index],
        )
        quality.append(round(reached, 4))
    maps = _type_maps(own, method.slots, coefficients, Functionals.known(result.anchor_latents))
    return {name: value.astype(np.float32) for name, value in maps.items()}, quality


def _joined(
    own: Factors, place: str, latents: Matrix, weights: Matrix, k: float
) -> tuple[Matrix, float]:
    """Coefficients of a type by ridge onto known latents, and the correlation on a fifth of the anchors held out."""
    scores = np.asarray(own[f"{place}.scores"], dtype=np.float64)
    if len(scores) != len(latents):
        raise ConfigError(
            f"the new type saw {len(scores)} anchors, the federation was aligned on {len(latents)}"
        )
    cut = round(0.8 * len(scores))
    centred = scores - scores[:cut].mean(axis=0)
    reached = centred[cut:] @ ridge(scores[:cut], latents[:cut], k)
    columns = [np.corrcoef(reached[:, j], latents[cut:, j])[0, 1] for j in range(latents.shape[1])]
    found = unit_variance(scores, ridge(scores, latents, k)) * weights
    return found, float(np.nanmean(columns))


def _fit_core(
    factors: Mapping[str, Factors],
    alignment: AlignmentConfig,
    method: MethodConfig,
    seed: int,
    apart: Collection[str],
) -> dict[str, SlotFit]:
    """The shared latents of every place, of the types that have a say in them."""
    core = sorted(set(factors) - set(apart)) or sorted(factors)
    while True:
        fits = {
            place: fit_slot(
                {key: np.asarray(factors[key][f"{place}.scores"], np.float64) for key in core},
                method.latent, list(alignment.shrinkage), alignment.weighting, seed,
            )
            for place in places_of(method)
        }  # fmt: skip
        mean = {key: float(np.mean([fit.quality[key] for fit in fits.values()])) for key in core}
        worst = min(core, key=lambda key: mean[key])
        # Of two that do not correlate nobody knows which is right.
        if len(core) < 3 or mean[worst] >= alignment.quality_threshold:
            return fits
        core.remove(worst)


def _rotation(rng: np.random.Generator, size: int) -> Matrix:
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    rotation: Matrix = q * np.sign(np.diag(r))
    return rotation


def apply_control(
    maps: dict[str, dict[str, Matrix]],
    factors: Mapping[str, Factors],
    control: str,
    weights: Mapping[str, Matrix],
    seed: int,
) -> dict[str, dict[str, Matrix]]:
    """Break the alignment on purpose (the controls of docs/method.md); ``none`` changes nothing.

    ``random_down``/``random_up``/``random_maps`` draw D and/or U anew for every type, at the same scale (latent
    by latent: ``weights`` holds the r scales of every place); ``rotated_basis`` rotates the latent bases
    of one type (the last in order).
    """
    if control == "none":
        return maps
    last_type = sorted(maps)[-1]
    for key, own in maps.items():
        for place, scale in weights.items():
            rng = generator(seed, f"control.{control}.{key}.{place.removeprefix('slots.')}")
            prefix, has_output = f"{place}.map", f"{place}.map.up.weight" in own
            if control in ("random_down", "random_maps"):
                scores = np.asarray(factors[key][f"{place}.scores"], dtype=np.float64)
                basis = np.asarray(factors[key][f"{place}.basis"], dtype=np.float64)
                mean = np.asarray(factors[key][f"{place}.mean"], dtype=np.float64)
                drawn = rng.standard_normal((scores.shape[1], len(scale)))
                down = (unit_variance(scores, drawn) * scale).T @ basis
                own[f"{prefix}.down.weight"], own[f"{prefix}.down.bias"] = down, -(down @ mean)
            if control in ("random_up", "random_maps") and has_output:
                up = own[f"{prefix}.up.weight"]
                drawn = rng.standard_normal(up.shape)
                own[f"{prefix}.up.weight"] = drawn * (np.linalg.norm(up) / np.linalg.norm(drawn))
            if control == "rotated_basis" and key == last_type:
                down = own[f"{prefix}.down.weight"]
                turn = _rotation(rng, len(down))
                own[f"{prefix}.down.weight"] = turn @ down
                own[f"{prefix}.down.bias"] = turn @ own[f"{prefix}.down.bias"]
                if has_output:
                    up = own[f"{prefix}.up.weight"]
                    own[f"{prefix}.up.weight"] = up @ _rotation(rng, up.shape[1])
    return maps


def resolve_output(
    method: MethodConfig, alignment: AlignmentConfig, labels: Sequence[str] | None
) -> MethodConfig:
    """Fill ``method.output``: as given; number of labels (closed set, output by labels); else r."""
    if method.output is not None:
        return method
    by_labels = alignment.output == "labels" and labels
    return replace(method, output=len(labels) if by_labels and labels else method.latent)
