"""Front door of the latent alignment: maps for a set of types, from the cache or from their factors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterotune_flwr.alignment.kept import kept_maps, maps_path
from heterotune_flwr.alignment.maps import APART, AlignmentResult, compute_maps, join_type
from heterotune_flwr.alignment.public_texts import (
    Anchor,
    load_anchors,
    place_digest,
    read_anchors,
    reading_places,
    whole_texts,
)
from heterotune_flwr.alignment.views import SLOTS, view_asked
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.storage import load_tensors, save_tensors
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig, MethodConfig

__all__ = [
    "AlignmentResult",
    "Trust",
    "align_types",
    "compute_maps",
    "factors_path",
    "join_known",
    "join_type",
    "load_anchors",
]

#: Counts up when the factors' meaning changes, so that old cache files are not used.
VERSION = 4
#: Called with what is read of the anchors, ``slots`` or the name of a view, and types.
Ask = Callable[[str, list[str]], dict[str, Tensors]]


@dataclass
class Trust:
    """What whoever asks has found out of the factors it got; all are trusted where nobody fills it.

    Attributes
    ----------
    unchecked
        Types of which one client alone has told: used, never put into the cache.
    apart
        Types whose clients disagree: as ``unchecked``, and without a say in the others' maps.
    lost
        Type -> why there are no usable factors of it: it gets no maps.

    """

    unchecked: set[str] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)


def places_read(alignment: AlignmentConfig, part: str) -> list[Anchor]:
    """What is read of the anchors for a part of the factors: ``slots``, or a view's whole texts (DataError)."""
    anchors = read_anchors(alignment)
    return whole_texts(anchors) if view_asked(part) else reading_places(anchors, alignment)


def read_digest(alignment: AlignmentConfig, part: str) -> str:
    """Identity (hex) of :func:`places_read`."""
    return place_digest(places_read(alignment, part))


def factors_path(
    fingerprints: Mapping[str, str],
    type_key: str,
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
    anchors: str,
    part: str = SLOTS,
) -> Path:
    """Cache file of one type's factors.

    Keyed by the type's backbone and bits, the anchors (by :func:`read_digest`), the prompt form and the settings that
    the factors depend on; the symbols depend on all types, so with ``output: vocabulary`` the whole set of types is
    part of the key. Those of a view depend on neither labels nor symbols.
    """
    alignment = config.alignment
    parts: dict[str, object] = {
        "version": VERSION,
        "backbone": [fingerprints[type_key], type_key.rpartition("@")[2]],  # weights and bits
        "anchors": anchors,
        "prompt": _written(config.data),
        "max_length": config.data.max_length,
        "components": alignment.components,
        "codec": exact_codec(config.exchange),  # factors are kept as they travelled
    }
    if view := view_asked(part):
        return _cache_file({**parts, "part": part, "view": view.version})
    parts |= {
        "labels": list(labels or []),
        "slots": method.slots,
        "pullback": alignment.pullback_anchors if method.slots > 1 else 0,
        "output": alignment.output,
    }
    if alignment.output == "vocabulary":
        parts["symbols"] = [
            alignment.symbols,
            alignment.output_components,
            sorted([value, key.rpartition("@")[2]] for key, value in fingerprints.items()),
        ]
    return _cache_file(parts)


def _written(data: DataConfig) -> str | list[str | None]:
    """What of a run's form an anchor's reading depends on, but for the backbone's own template."""
    if data.template == "plain" and data.system is None:
        return data.prompt
    return [data.prompt, data.template, data.system]


def _cache_file(parts: object) -> Path:
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "alignment" / f"{key}.safetensors"


def align_types(
    fingerprints: Mapping[str, str],
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
    ask: Ask,
    seed: int = 0,
    trust: Trust | None = None,
) -> AlignmentResult:
    """Maps for all types of a run whose factors can be had.

    Parameters
    ----------
    fingerprints
        Type -> fingerprint of its backbone at its bits.
    config, method, labels
        The run; ``method.output`` may still be null.
    ask
        Called with what to read (``slots``, or the name of a view) and the types whose factors are not in the cache;
        returns them (a Flower query inside a run, direct calls in ``heterotune align``).
    seed
        For the held-out split and the controls.
    trust
        What ``ask`` finds out; factors that are not trusted are not put into the cache.

    Raises
    ------
    FederationError
        There are factors of no type.

    """
    trust, caching = trust or Trust(), config.alignment.cache
    gathered = _Gathered.of(fingerprints, config, method, labels, caching, ask, trust)
    if not gathered.factors:
        raise FederationError(next(iter(trust.lost.values())))
    given = (gathered.factors, config.alignment, method, labels, seed)
    if caching and not (trust.unchecked | trust.apart):
        result = kept_maps(maps_path(*given), lambda: compute_maps(*given))
    else:
        result = compute_maps(*given, trust.apart)
    gathered.remember()
    return result


def join_known(
    known: AlignmentResult,
    type_key: str,
    fingerprint: str,
    config: Config,
    method: MethodConfig,
    labels: Sequence[str] | None,
    ask: Ask,
    trust: Trust,
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
    # Factors over symbols are for those that this very set of types shares.
    caching = alignment.cache and alignment.output == "labels"
    gathered = _Gathered.of({type_key: fingerprint}, config, method, labels, caching, ask, trust)
    if type_key in trust.lost:
        raise FederationError(trust.lost[type_key])
    maps, quality = join_type(known, gathered.factors[type_key], method)
    gathered.remember()
    return maps, [APART] * len(quality) if type_key in trust.apart else quality


@dataclass
class _Gathered:
    """Factors of some types, in order, and what of them is to be put into the cache."""

    factors: dict[str, Tensors]
    fresh: dict[Path, Tensors] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        fingerprints: Mapping[str, str],
        config: Config,
        method: MethodConfig,
        labels: Sequence[str] | None,
        caching: bool,
        ask: Ask,
        trust: Trust,
    ) -> _Gathered:
        """Read what is in the cache, and ask for the rest."""
        gathered = cls({key: {} for key in sorted(fingerprints)})
        for part in (SLOTS, *method.views):
            anchors = read_digest(config.alignment, part)
            paths = {
                key: factors_path(fingerprints, key, config, method, labels, anchors, part)
                for key in gathered.factors
            }
            found = _cached_factors(paths) if caching else {}
            missing = [key for key in paths if key not in found]
            fresh = ask(part, missing) if missing else {}
            found |= fresh
            if caching:
                doubted = trust.unchecked | trust.apart
                gathered.fresh |= {paths[k]: v for k, v in fresh.items() if k not in doubted}
            for key, factors in gathered.factors.items():
                factors |= found.get(key, {})
        gathered._agree_on_anchors(trust)
        for key in trust.lost:
            gathered.factors.pop(key, None)
        return gathered

    def _agree_on_anchors(self, trust: Trust) -> None:
        """Types that have read another number of anchors than most cannot be aligned with them."""
        counts = {
            key: len(next(v for n, v in sorted(own.items()) if n.endswith(".scores")))
            for key, own in self.factors.items()
            if key not in trust.lost
        }
        usual = max(counts.values(), key=list(counts.values()).count, default=0)
        for key, count in counts.items():
            if count != usual:
                trust.lost[key] = f"{key} has read {count} anchors, the others {usual}"

    def remember(self) -> None:
        """Put factors that have been of use into the cache."""
        for path, factors in self.fresh.items():
            save_tensors(path, factors)


def _cached_factors(paths: Mapping[str, Path]) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for key, path in paths.items():
        if path.exists():
            try:
                found[key] = load_tensors(path)
            except ExchangeError:
                path.unlink(missing_ok=True)
    return found
