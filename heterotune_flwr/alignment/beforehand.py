"""Computes a run's latent maps on one machine beforehand, so that no client has to be asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from heterotune_flwr.alignment.align import align_types
from heterotune_flwr.alignment.factors import alignment_factors, view_factors
from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.alignment.public_texts import read_anchors, reading_places
from heterotune_flwr.alignment.views import places_of, view_asked
from heterotune_flwr.backbones.bits import resolve_spec
from heterotune_flwr.backbones.loading import Backbone, load_backbone
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.data.symbols import Symbols, vocabulary_of
from heterotune_flwr.data.template import make_form
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import Tensors, round_trip
from heterotune_flwr.schema import Config, MethodConfig

#: Between two words of how far the reading is.
_SECONDS = 10.0


def prealign(
    config: Config, methods: Sequence[MethodConfig], report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Align all types of ``config`` here and keep the factors in the cache.

    Parameters
    ----------
    config
        The run to prepare; its types name the backbones.
    methods
        Of its strategies, one at least: the maps of each.
    report
        Called with progress lines.

    Returns
    -------
    Type -> held-out canonical correlation per slot, and of every view, of the method with most of them.

    """
    if not config.types:
        raise ConfigError("types is empty: name the backbones to align")
    torch.set_num_threads(config.run.worker_threads)
    loaded: dict[str, Backbone] = {}
    for entry in config.types:
        spec = resolve_spec(entry.backbone, entry.bits, entry.revision, entry.memory_gb)
        loaded[spec.type_key] = load_backbone(spec)
    anchors = read_anchors(config.alignment)
    places = reading_places(anchors, config.alignment)
    texts = [anchor.text for anchor in anchors]
    labels = label_set(config.data)
    tokens: dict[str, list[int]] = {key: [] for key in loaded}
    if config.alignment.output == "vocabulary":
        forms = {key: make_form(one.tokenizer, config.data) for key, one in loaded.items()}
        own = {key: vocabulary_of(form) for key, form in forms.items()}
        shared = Symbols.shared([one.pieces for one in own.values()], config.alignment.symbols)
        tokens = {key: shared.ids(one).tolist() for key, one in own.items()}

    def ask(slots: int, part: str, type_keys: list[str]) -> dict[str, Tensors]:
        answers: dict[str, Tensors] = {}
        for key in type_keys:
            view = view_asked(part)
            count, whole = (len(texts), ", whole texts") if view else (len(places), "")
            report(f"reading {count} anchors with {key}{whole}")
            run = (config.alignment, config.data)
            if view:
                answers[key] = view_factors(view, loaded[key], texts, *run)
            else:
                answers[key] = alignment_factors(
                    loaded[key], places, *run, labels, slots, tokens[key], _told(report)
                )
        return {
            key: round_trip(value, exact_codec(config.exchange)) for key, value in answers.items()
        }

    fingerprints = {key: backbone.fingerprint for key, backbone in loaded.items()}
    for method in sorted(methods, key=lambda method: len(places_of(method))):
        method = resolve_output(method, config.alignment, labels)
        asking = partial(ask, method.slots)
        quality = align_types(fingerprints, config, method, labels, asking).quality
    return quality


def _told(report: Callable[[str], None]) -> Callable[[int, int], None]:
    """How far the reading is, every ten seconds."""
    last = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() >= last + _SECONDS and done < of:
            last = time.monotonic()
            report(f"  {done} of {of}")

    return progress
