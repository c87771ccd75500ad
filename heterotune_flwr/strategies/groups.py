"""Who shares what: the server's copy of every group of tensors, and which types work with which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.federation.updates import ClientUpdate, Shapes

#: Who shares a tensor: all clients, those of a model type, nobody; or it keeps its first value, and never travels.
Scope = Literal["global", "type", "client", "fixed"]
#: The group of tensors shared by every client; a type's own group is ``type/<type key>``.
GLOBAL = "global"


class Groups:
    """One copy of every group of shared tensors: ``global`` for all clients, ``type/<key>`` for those of a type.

    Parameters
    ----------
    shapes
        Of every tensor that clients of a type train, by type.
    scope
        Who shares a tensor (name, type).
    seed
        First values are a function of it.

    Attributes
    ----------
    of
        Type -> name of a shared tensor -> its group.
    fixed
        Type -> names of the tensors that keep their first values.
    state
        Group -> name -> value: all that a finished run hands over.

    Raises
    ------
    ConfigError
        A scope is none, or types are to share a tensor that they have in different shapes.

    """

    def __init__(
        self, shapes: Mapping[str, Shapes], scope: Callable[[str, str], str], seed: int
    ) -> None:
        self.of: dict[str, dict[str, str]] = {key: {} for key in shapes}
        self.fixed: dict[str, set[str]] = {key: set() for key in shapes}
        self._shapes: dict[str, Shapes] = {}
        self._seed = seed
        for type_key in shapes:
            for name, shape in shapes[type_key].items():
                self._place(type_key, name, shape, scope(name, type_key))
        self.state: dict[str, Tensors] = {
            group: self.first_values(group) for group in sorted(self._shapes)
        }

    def _place(self, type_key: str, name: str, shape: tuple[int, ...], scope: str) -> None:
        if scope not in get_args(Scope):
            known = ", ".join(get_args(Scope))
            raise ConfigError(f"scope() of {name} is {scope!r}; one of {known} is needed")
        if scope == "fixed":
            self.fixed[type_key].add(name)
        if scope in ("client", "fixed"):
            return
        group = GLOBAL if scope == "global" else f"type/{type_key}"
        known_shape = self._shapes.setdefault(group, {}).setdefault(name, shape)
        if known_shape != shape:
            raise ConfigError(
                f"{name} is to be shared by all types but {type_key} has it as "
                f"{list(shape)}, another type as {list(known_shape)}; share it inside types"
            )
        self.of[type_key][name] = group

    def first_values(self, group: str) -> Tensors:
        """What a group's tensors are before round 1."""
        return initial_tensors(self._shapes[group], self._seed)

    def slice(self, type_key: str) -> Tensors:
        """All shared tensors a client of this type works with."""
        return {name: self.state[group][name] for name, group in self.of[type_key].items()}

    def holders(self, group: str, name: str) -> set[str]:
        """Types that work with a group's tensor."""
        return {key for key, groups in self.of.items() if groups.get(name) == group}

    def fork_global(self, types: Iterable[str]) -> None:
        """Move every global tensor into the groups of some types, with the value it has unless the type has its own."""
        for type_key in types:
            groups, own = self.of[type_key], f"type/{type_key}"
            for name in [name for name, group in groups.items() if group == GLOBAL]:
                groups[name] = own
                value = self.state[GLOBAL][name]
                self._shapes.setdefault(own, {})[name] = value.shape
                self.state.setdefault(own, {}).setdefault(name, value)

    def part_of(self, update: ClientUpdate, group: str) -> ClientUpdate:
        """The tensors of an update that belong to a group."""
        groups = self.of[update.type_key]
        return update.only(name for name in update.deltas if groups[name] == group)

    def divide(self, updates: Sequence[ClientUpdate]) -> Iterator[tuple[str, list[ClientUpdate]]]:
        """Every group that somebody has trained, with the updates' parts."""
        for group in list(self.state):
            parts = [self.part_of(update, group) for update in updates]
            if parts := [part for part in parts if part.deltas]:
                yield group, parts

    def apply(self, steps: Mapping[str, Tensors]) -> None:
        """Add the steps of all groups."""
        for group, step in steps.items():
            self.state[group] |= {n: self.state[group][n] + d for n, d in step.items()}
