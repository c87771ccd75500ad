"""Keys of earlier versions, refused with the name they have today."""

from __future__ import annotations

import re
from collections.abc import Iterable

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import nearest

#: By section (``strategy``: an entry of ``strategies``): the old key and the new one, or in brackets where it has gone.
RENAMED: dict[str, dict[str, str]] = {
    "strategy": {
        "consensus": "predictions",
        "discriminant": "statistics",
        "type_phase": "personalization_phase",
    },
    "predictions": {
        "trust": "agreement_power",
        "confidence": "entropy_power",
        "scope": "pool_over",
    },
    "statistics": {
        "least": "min_count",
        "fitted": "distill_share",
        "agreement": "min_cosine",
        "scope": "pool_over",
    },
    "alignment": {"words": "symbols"},
    "server": {"bench_after": "cooldown_after", "bench_longest": "cooldown_longest"},
    "strategies": {"heterotune_deep": "heterotune_lora"},
    "transform": {"deconflict": "pcgrad"},
    "groups.exchange": {"nf4": "tiny"},
}
#: Keys that are no more, with what became of them.
GONE: dict[str, dict[str, str]] = {
    "strategy": {
        "answers": "write predictions: {answers_by: client}",
        "mixing": "types' banks are not mixed any more; leave it out",
    },
    "predictions": dict.fromkeys(
        ("informativeness_power", "focus"), "texts are drawn with equal chances"
    ),
    "alignment": {"positions": "states are read where the answer is; leave it out"},
    "method": {
        "ngrams": "the package has no character n-grams any more",
        "text_view": "write views: [text], or views: []",
        **dict.fromkeys(
            ("experts_type", "experts_private", "private_dropout"),
            "all experts are shared by all clients now; leave it out",
        ),
    },
    "strategies": {
        "heterotune_guarded": "directions are compared by a chain in YAML now: docs/strategies.md, CMGA",
        "bank": "it is heterotune with predictions: null and statistics: null (docs/strategies.md, Compositions)",
        "within_consensus": "it is within_type with predictions: {...} (docs/strategies.md, Compositions)",
        "within_discriminant": "it is within_type with predictions: {...}, statistics: {...} and method: "
        "{views: [text]} (docs/strategies.md, Compositions)",
    },
    "transform": {
        "equalise_norms": "clip_to_median makes no type pull harder than others",
        "weigh_reliability": "all types weigh the same",
        "downweight_outliers": "all types weigh the same",
        "weigh_dissent": "all types weigh the same",
        "fedmgda_plus": "cagrad and pcgrad are left",
        "aligned_mtl": "cagrad and pcgrad are left",
        "ties": "cagrad and pcgrad are left",
    },
    "combine": {
        "rescale": "a step is as long as it comes out; leave it out",
        "guard": "no type's own update is guarded any more; leave it out",
    },
    "cagrad": {"rescale": "a step is as long as it comes out; leave it out"},
}


def became(section: str, key: str) -> str:
    """What became of a key of earlier versions, as the rest of an error's line; empty where it never was one."""
    if new := RENAMED.get(section, {}).get(key):
        return f"; it is called {new} now"
    why = GONE.get(section, {}).get(key)
    return f"; {why}" if why else ""


def unknown_key(where: str, key: str, known: Iterable[str], section: str = "") -> ConfigError:
    """Error about a key that a section does not have: its new name, what became of it, or the nearest known one.

    Parameters
    ----------
    where
        The section as the user wrote it: ``strategies.heterotune.method``.
    key, known
        What is there, and what may be.
    section
        Its name in :data:`RENAMED`, unless that is the last part of ``where``, after a dot or a colon.

    """
    section = section or re.split(r"[.:] ?", where)[-1]
    names = list(known)
    hint = became(section, key) or nearest(key, names) or f"; known: {', '.join(names) or 'none'}"
    path = where or "the configuration"
    return ConfigError(
        f"{path} has no key {key!r}{hint}",
        f"{path} has a key that this version does not know{hint}",
    )
