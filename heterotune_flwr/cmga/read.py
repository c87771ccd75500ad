"""From a chain in YAML to transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heterotune_flwr.cmga.base import Transform
from heterotune_flwr.cmga.chain import chain
from heterotune_flwr.cmga.clip import clip_to_median
from heterotune_flwr.cmga.combining import combine, server_opt, within_type_mean
from heterotune_flwr.cmga.directions import cagrad, pcgrad
from heterotune_flwr.config.components import COMPONENT, import_component
from heterotune_flwr.config.options import read_arguments
from heterotune_flwr.config.renamed import unknown_key
from heterotune_flwr.errors import ConfigError

#: Every transform a YAML chain may name.
TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "clip_to_median": clip_to_median,
    "pcgrad": pcgrad,
    "within_type_mean": within_type_mean,
    "combine": combine,
    "cagrad": cagrad,
    "server_opt": server_opt,
}
#: Those that make one direction of what they get; a chain has exactly one of them.
COMBINERS = ("combine", "cagrad")


def build_chain(specs: Sequence[Mapping[str, Any]]) -> Transform:
    """Build the chain a YAML list describes.

    Raises
    ------
    ConfigError
        An entry names an unknown transform or option, or the order makes no sense: one of :data:`COMBINERS` comes last
        but for ``server_opt``, ``within_type_mean`` at most once, ``clip_to_median`` before it.

    """
    parts = [_build_one(spec, position) for position, spec in enumerate(specs, start=1)]
    names = [part.name for part in parts]
    if not names:
        raise ConfigError("the CMGA chain is empty; null is the default chain")
    last = len(names) - 1 - (names[-1] == "server_opt")
    if "server_opt" in names[:last]:
        raise ConfigError("`server_opt` works on the combined direction: put it last, once")
    if names.count("within_type_mean") > 1:
        raise ConfigError("the CMGA chain names `within_type_mean` twice; it works once")
    if "clip_to_median" in names[_index(names, "within_type_mean") :]:
        raise ConfigError("`clip_to_median` works on clients: put it before `within_type_mean`")
    combining = [index for index, name in enumerate(names) if name in COMBINERS]
    if combining != [last] and (combining or COMPONENT not in specs[last]):
        raise ConfigError(
            f"the CMGA chain must end with one of {', '.join(COMBINERS)}, optionally then `server_opt`"
        )
    return chain(*parts)


def _index(names: Sequence[str], name: str) -> int:
    """Where a name stands; the end where it does not."""
    return list(names).index(name) if name in names else len(names)


def _build_one(spec: Any, position: int) -> Transform:
    where = f"entry {position} of the CMGA chain"
    if not isinstance(spec, Mapping) or not {"transform", COMPONENT} & set(spec):
        raise ConfigError(f"{where} is {spec!r}; write `transform: <name>` and its options")
    if "transform" in spec:
        name = str(spec["transform"])
        if name not in TRANSFORMS:
            raise unknown_key(where, name, TRANSFORMS, "transform")
        make = TRANSFORMS[name]
    else:
        name = str(spec[COMPONENT])
        make = import_component(name, where)
        if not inspect.isfunction(make):
            raise ConfigError(f"{where}: {COMPONENT} is {name!r}, which is no function")
    options = {key: value for key, value in spec.items() if key not in ("transform", COMPONENT)}
    arguments = read_arguments(make, options, f"{where}: {name.rpartition('.')[2]}")
    try:
        made = make(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {name}: {error}") from error
    if not isinstance(made, Transform):
        raise ConfigError(f"{where}: {name} returns a {type(made).__name__}, not a cmga.Transform")
    return made
