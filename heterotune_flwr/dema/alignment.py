"""Front door of the latent alignment: maps for a set of types, from the cache or from their factors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.config.schema import Config, MethodConfig
from heterotune_flwr.dema.anchors import anchor_digest, load_anchors, public_words
from heterotune_flwr.dema.maps import AlignmentResult, compute_maps, join_type
from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.storage import load_tensors, save_tensors

__all__ = [
    "AlignmentResult",
    "align_types",
    "compute_maps",
    "factors_path",
    "join_known",
    "join_type",
    "load_anchors",
    "public_words",
]

#: Counts up when the factors' meaning changes, so that old cache files are not used.
VERSION = 3
Ask = Callable[[list[str]], dict[str, Tensors]]


def _key(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def factors_path(
    fingerprints: Mapping[str, str],
    type_key: str,
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
) -> Path:
    """Cache file of one type's factors.

    Keyed by the type's backbone and bits, the anchors, the prompt form and the settings that the factors depend on; the
    shared words depend on all types, so with ``output: vocabulary`` the whole set of types is part of the key.
    """
    alignment = config.alignment
    parts: dict[str, object] = {
        "version": VERSION,
        "backbone": [fingerprints[type_key], type_key.rpartition("@")[2]],  # weights and bits
        "anchors": anchor_digest(load_anchors(alignment)),
        "prompt": config.data.prompt,
        "max_length": config.data.max_length,
        "labels": list(labels or []),
        "slots": method.slots,
        "positions": alignment.positions,
        "components": alignment.components,
        "pullback": alignment.pullback_anchors if method.slots > 1 else 0,
        "output": alignment.output,
        "codec": exact_codec(config.exchange),  # factors are kept as they travelled
    }
    if method.text_view:
        parts["text_view"] = True
    if alignment.output == "vocabulary":
        parts["words"] = [
            alignment.words,
            alignment.output_components,
            sorted([value, key.rpartition("@")[2]] for key, value in fingerprints.items()),
        ]
    return cache_dir() / "alignment" / f"{_key(parts)}.safetensors"


def align_types(
    fingerprints: Mapping[str, str],
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
    ask: Ask,
    seed: int = 0,
) -> AlignmentResult:
    """Maps for all types of a run.

    Parameters
    ----------
    fingerprints
        Type -> fingerprint of its backbone at its bits.
    config, method, labels
        The run; ``method.output`` may still be null.
    ask
        Called with the types whose factors are not in the cache; returns them (a Flower query inside a run, direct
        calls in ``heterotune align``).
    seed
        For the held-out split and the controls.

    """
    paths = {key: factors_path(fingerprints, key, config, method, labels) for key in fingerprints}
    factors, asked = _gather(paths, config.alignment.cache, ask)
    result = compute_maps(factors, config.alignment, method, labels, seed)
    _remember(paths, factors, asked if config.alignment.cache else [])
    return result


def join_known(
    known: AlignmentResult,
    type_key: str,
    fingerprint: str,
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
    ask: Ask,
) -> tuple[Tensors, list[float]]:
    """Maps and quality of one type that comes when the others' maps are settled (:func:`.maps.join_type`).

    Raises
    ------
    ConfigError
        The type cannot be fitted to what is known.

    """
    alignment = config.alignment
    if alignment.control != "none":
        raise ConfigError(f"alignment.control={alignment.control} is drawn for all types at once")
    path = {type_key: factors_path({type_key: fingerprint}, type_key, config, method, labels)}
    # Factors over words are for the words that this very set of types shares.
    caching = alignment.cache and alignment.output == "labels"
    factors, asked = _gather(path, caching, ask)
    joined = join_type(known, factors[type_key], method)
    _remember(path, factors, asked if caching else [])
    return joined


def _gather(
    paths: Mapping[str, Path], caching: bool, ask: Ask
) -> tuple[dict[str, Tensors], list[str]]:
    """Factors of the types, in order, and which of them had to be asked for."""
    factors: dict[str, Tensors] = {}
    for key, path in paths.items():
        if caching and path.exists():
            try:
                factors[key] = load_tensors(path)
            except ExchangeError:
                path.unlink(missing_ok=True)
    missing = [key for key in sorted(paths) if key not in factors]
    if missing:
        fresh = ask(missing)
        for key in missing:
            _check_finite(fresh[key], key)
        factors |= {key: fresh[key] for key in missing}
    return {key: factors[key] for key in sorted(factors)}, missing


def _remember(
    paths: Mapping[str, Path], factors: Mapping[str, Tensors], keys: Sequence[str]
) -> None:
    """Put factors that have been of use into the cache."""
    for key in keys:
        save_tensors(paths[key], factors[key])


def _check_finite(factors: Tensors, key: str) -> None:
    for name, value in factors.items():
        if not np.isfinite(value).all():
            raise FederationError(
                f"the alignment factors of {key} hold numbers in {name} that are not finite"
            )
