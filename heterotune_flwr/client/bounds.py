"""What settings, adapters and maps a deployed node takes: bounds that no honest run goes beyond (no torch here).

Each function raises :class:`RefusedByNodeError` where something lies outside; :mod:`.guard` asks them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.limits import bounded, refuse, within
from heterotune_flwr.client.floors import Floors
from heterotune_flwr.schema import NATURAL_INSTRUCTIONS, Config, MethodConfig

Tensors = Mapping[str, NDArray[np.float32]]

#: Largest magnitude of a map's numbers.
_LARGEST_MAP = 1e3
#: A latent reads at least so many of a model's numbers, and so many directions of them are told (participation ratios).
_LEAST_READ, _LEAST_RANK = 8.0, 4.0
#: Bounds of settings that act on what leaves: section.key -> smallest and largest.
_SETTINGS: dict[str, tuple[float, float]] = {
    "train.clip_norm": (0.0, 10.0),
    "train.logit_adjustment": (0.0, 2.0),
    "train.prior_smoothing": (0.01, 100.0),
    "train.weight_decay": (0.0, 1.0),
    "train.gate_rate": (0.0, 10.0),
    "data.max_length": (16, 32768),
    "data.max_answer_tokens": (1, 4096),
}
#: Fields of an adapter's settings -> largest.
_METHOD: dict[str, float] = {
    "slots": 1024, "latent": 8192, "output": 8192, "inner": 8192, "experts_global": 64,
    "core_rank": 1024, "core_scale": 100, "lora_rank": 1024, "lora_alpha": 1e4, "sub_width": 1, "sub_window": 1e6,
}  # fmt: skip
#: Most numbers of an adapter's experts: 256 MB.
_MOST_NUMBERS = 1 << 26
_LABELS, _LETTERS, _PROMPT = 4096, 256, 20_000


def check_settings(config: Config, floors: Floors, guest: bool) -> None:
    """Refuse a run whose settings lie below the floors, whatever it asks later (RefusedByNodeError)."""
    for path, (least, most) in _SETTINGS.items():
        section, key = path.split(".")
        value = getattr(getattr(config, section), key)
        within(path, value, least, most)
    data = config.data
    if data.name == NATURAL_INSTRUCTIONS:
        refuse(
            "data.name natural_instructions chooses rows by the run's settings; it is for simulations"
        )
    if data.prompt.count("{text}") != 1 or len(data.prompt) > _PROMPT:
        refuse(f"data.prompt must hold {{text}} once and have at most {_PROMPT} letters")
    if len(data.system or "") > _PROMPT:
        refuse(f"data.system must have at most {_PROMPT} letters")
    labels = data.labels or []
    if len(labels) > _LABELS or any(len(label) > _LETTERS for label in labels):
        refuse(f"data.labels are at most {_LABELS} labels of at most {_LETTERS} letters")
    if not guest and config.train.batch_size < floors.step_examples:
        refuse(
            f"train.batch_size is {config.train.batch_size}; this node takes at least {floors.step_examples} examples "
            "a step (step-examples in its node.toml)"
        )


def check_losses(wanted: Collection[str], allowed: Collection[str] | None) -> None:
    """Refuse further losses (``train.losses``) that the owner has not named; None: all are allowed.

    Their options are the run's: one that weighs examples can be made to train on a single one.
    """
    for name in wanted:
        if allowed is not None and name not in allowed:
            refuse(
                f"train.losses names {name[:80]!r}, which this node's owner does not allow (losses in its node.toml)"
            )


def check_method(method: MethodConfig) -> None:
    """Refuse an adapter that is larger, or stranger, than any (RefusedByNodeError)."""
    for name, most in _METHOD.items():
        value = getattr(method, name)
        if value is not None:
            within(f"method.{name}", value, 0, most)
    within("the size of the adapter", _numbers_of(method), 0, _MOST_NUMBERS)


def check_maps(maps: Tensors) -> None:
    """Refuse maps that are not finite, too large, or that read single numbers of a model (RefusedByNodeError).

    A sanity check, no proof: dense maps can be undone by whoever knows them.
    """
    bounded(maps, "the maps", _LARGEST_MAP)
    for name, value in maps.items():
        if not name.endswith("down.weight") or value.ndim != 2:
            continue
        within("the number of latents", len(value), 1, _METHOD["latent"])
        weights = value[np.any(value, axis=1)].astype(np.float64)
        squares = weights**2
        width = weights.shape[1]
        read = squares.sum(axis=1) ** 2 / np.maximum((squares**2).sum(axis=1), 1e-300)
        inner = weights @ weights.T  # its eigenvalues are the directions' energies
        rank = squares.sum() ** 2 / max(float(np.square(inner).sum()), 1e-300)
        if (
            not len(weights)
            or np.median(read) < min(_LEAST_READ, width / 4)
            or (rank < min(_LEAST_RANK, len(value) / 2))
        ):
            refuse(f"the map {name} reads single numbers of this node's model")


def _numbers_of(method: MethodConfig) -> int:
    """How many numbers the experts of an adapter have, whatever the model."""
    output = method.output or method.latent
    expert = method.inner * (method.latent + output) if method.inner else method.latent * output
    return method.slots * method.experts_global * expert
