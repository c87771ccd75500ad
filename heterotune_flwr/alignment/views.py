"""Where types are aligned: at the slots, and in the views of a text that a method names (:mod:`..backbones.views`)."""

from __future__ import annotations

from heterotune_flwr.backbones.views import VIEWS, View
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.fields import nearest
from heterotune_flwr.schema import MethodConfig

#: What is asked of a type first: the states that its slots see.
SLOTS = "slots"
#: What is asked where vocabularies differ: what they hold (:mod:`..data.symbols`).
PIECES = "pieces"


def views_of(method: MethodConfig) -> list[View]:
    """The views of a method, in order (ConfigError: there is none of a name)."""
    for name in method.views:
        if name not in VIEWS:
            need = f"choose from {', '.join(VIEWS)}{nearest(name, VIEWS)}"
            raise ConfigError.of("method.views", name, need)
    return [VIEWS[name] for name in method.views]


def view_asked(part: str) -> View | None:
    """The view a message names; None for the slots.

    Raises
    ------
    ExchangeError
        There is no such view here.

    """
    if part == SLOTS:
        return None
    if part not in VIEWS:
        raise ExchangeError(f"this version knows the views {', '.join(VIEWS)}, not the one asked")
    return VIEWS[part]


def places_of(method: MethodConfig) -> list[str]:
    """Where types are aligned: at every slot, and in every view."""
    return [*(f"{SLOTS}.{slot}" for slot in range(method.slots)), *method.views]


def classifier_places(method: MethodConfig) -> list[str]:
    """Where the pooled classifier reads ``r`` latents each: at the last slot, and in every view."""
    return places_of(method)[method.slots - 1 :]
