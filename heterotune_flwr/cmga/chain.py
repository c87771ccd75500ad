"""Composing transforms, in Python or from YAML."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heterotune_flwr.cmga.alternatives import aligned_mtl, cagrad, fedmgda_plus, pcgrad, ties
from heterotune_flwr.cmga.base import Transform, Updates
from heterotune_flwr.cmga.directions import combine, deconflict, server_opt
from heterotune_flwr.cmga.outliers import downweight_outliers
from heterotune_flwr.cmga.weights import equalise_norms, weigh_reliability, within_type_mean
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State

#: Every transform a YAML chain may name.
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "within_type_mean": within_type_mean,
    "equalise_norms": equalise_norms,
    "weigh_reliability": weigh_reliability,
    "downweight_outliers": downweight_outliers,
    "deconflict": deconflict,
    "combine": combine,
    "server_opt": server_opt,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "fedmgda_plus": fedmgda_plus,
    "aligned_mtl": aligned_mtl,
    "ties": ties,
}
#: Those that make one direction of the types' updates; a chain has exactly one of them.
COMBINERS = ("combine", "cagrad", "fedmgda_plus", "aligned_mtl", "ties")

#: Names a user's own transform by dotted path, in the place of ``transform``.
COMPONENT = "_component_"

#: CMGA: every type pulls equally hard, whatever its backbone's scale and however many clients it has.
DEFAULT_CHAIN: tuple[Mapping[str, Any], ...] = (
    {"transform": "within_type_mean"},
    {"transform": "equalise_norms"},
    {"transform": "combine", "weights": "equal", "guard": False},
    {"transform": "server_opt"},
)

#: CMGA with all its steps: reliable types count more, conflicts are removed, and no type is worked against.
GUARDED_CHAIN: tuple[Mapping[str, Any], ...] = (
    {"transform": "within_type_mean"},
    {"transform": "equalise_norms"},
    {"transform": "weigh_reliability"},
    {"transform": "deconflict"},
    {"transform": "combine"},
    {"transform": "server_opt"},
)

#: Plain example-weighted averaging of all clients, the ablation.
MEAN_CHAIN: tuple[Mapping[str, Any], ...] = (
    {"transform": "within_type_mean"},
    {"transform": "combine", "weights": "examples", "rescale": False, "guard": False},
)


def chain(*transforms: Transform) -> Transform:
    """Run transforms one after the other; the chain is a transform itself."""
    keys = [f"{index}.{transform.name}" for index, transform in enumerate(transforms)]

    def init() -> State:
        return {key: part.init() for key, part in zip(keys, transforms, strict=True)}

    def update(state: State, updates: Updates) -> tuple[State, Updates]:
        new: State = {}
        for key, part in zip(keys, transforms, strict=True):
            new[key], updates = part.update(state[key], updates)
        return new, updates

    return Transform("chain", init, update)


def _build_one(spec: Any, position: int) -> Transform:
    where = f"entry {position} of the CMGA chain"
    if not isinstance(spec, Mapping) or not {"transform", COMPONENT} & set(spec):
        raise ConfigError(f"{where} is {spec!r}; write `transform: <name>` and its options")
    options = {
        str(key): value for key, value in spec.items() if key not in ("transform", COMPONENT)
    }
    name, make = _named(spec, where) if "transform" in spec else _own(str(spec[COMPONENT]), where)
    known = list(inspect.signature(make).parameters)
    for key in options:
        if key not in known:
            raise ConfigError(
                f"{where}: {name} has no option {key!r}; it has {', '.join(known) or 'none'}"
            )
    for key, value in options.items():
        if isinstance(value, str) and isinstance(_default(make, key), (int, float)):
            raise ConfigError(f"{where}: {name}.{key} is {value!r}; a number is needed")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name}.{key} is {value!r}; a finite number is needed")
    try:
        made = make(**options)
    except TypeError as error:
        raise ConfigError(f"{where}: {name}: {error}") from error
    if not isinstance(made, Transform):
        raise ConfigError(f"{where}: {name} returns a {type(made).__name__}, not a cmga.Transform")
    return made


def _default(make: Callable[..., Transform], option: str) -> Any:
    """What an option is unless somebody says otherwise."""
    return inspect.signature(make).parameters[option].default


def _named(spec: Mapping[str, Any], where: str) -> tuple[str, Callable[..., Transform]]:
    name = str(spec["transform"])
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(name, TRANSFORMS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TRANSFORMS)}"
        raise ConfigError(f"{where} names the unknown transform {name!r}; {hint}")
    return name, TRANSFORMS[name]


def _own(path: str, where: str) -> tuple[str, Callable[..., Transform]]:
    """A user's transform by dotted path (chains are built on the server alone)."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: {COMPONENT} is {path!r}: {error}") from error
    if not inspect.isfunction(found):
        raise ConfigError(f"{where}: {COMPONENT} is {path!r}, which is no function")
    return name, found


def build_chain(specs: Sequence[Mapping[str, Any]]) -> Transform:
    """Build the chain a YAML list describes.

    Raises
    ------
    ConfigError
        An entry names an unknown transform or option, or the order makes no sense:
        ``within_type_mean`` comes first, one of :data:`COMBINERS` comes last but for ``server_opt``.

    """
    parts = [_build_one(spec, position) for position, spec in enumerate(specs, start=1)]
    names = [part.name for part in parts]
    if not names or names[0] != "within_type_mean" or names.count("within_type_mean") != 1:
        raise ConfigError("the CMGA chain must begin with `within_type_mean`, named once")
    last = len(names) - 1 - (names[-1] == "server_opt")
    if "server_opt" in names[:last]:
        raise ConfigError("`server_opt` works on the combined direction: put it last, once")
    combining = [index for index, name in enumerate(names) if name in COMBINERS]
    if combining != [last] and (combining or COMPONENT not in specs[last]):
        raise ConfigError(
            f"the CMGA chain must end with one of {', '.join(COMBINERS)}, optionally then `server_opt`"
        )
    return chain(*parts)
