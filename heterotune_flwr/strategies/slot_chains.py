"""CMGA slot by slot: clients' updates in, one step of the shared bank out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga import DEFAULT_CHAIN, Member, build_chain, make_updates
from heterotune_flwr.cmga.base import LazyMember
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.spill import Stored
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.updates import ClientUpdate

Vector = NDArray[np.float64]


class SlotChains:
    """One chain of transforms, its state per slot, and what it saw.

    Parameters
    ----------
    chain
        ``[{transform: name, option: value}]``; null for the default (ConfigError: not a chain).
    mean
        How ``within_type_mean`` averages, unless the chain says so itself.
    seed
        Of the transforms' draws.

    """

    def __init__(
        self,
        chain: Sequence[Mapping[str, Any]] | None,
        mean: RobustMean | None = None,
        seed: int = 0,
    ) -> None:
        entries = DEFAULT_CHAIN if chain is None else chain
        self._chain = build_chain(entries if mean is None else _with_rule(entries, mean))
        self._seed = seed
        self.states: dict[int, State] = {}
        self.log: dict[str, Any] = {}

    def step(self, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """The change of every slot's tensors."""
        step: Tensors = {}
        for slot in sorted({slot_of(name) for update in updates for name in update.deltas}):
            step |= self._slot_step(slot, round, updates)
        return step

    def _slot_step(self, slot: int, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """The chain's direction times the mean path length of the clients that train the slot."""
        sharing = [u for u in updates if any(slot_of(name) == slot for name in u.deltas)]
        names = sorted(name for name in sharing[0].deltas if slot_of(name) == slot)
        members = [_member(update, names) for update in sharing]
        length = sum(u.examples * u.path_length for u in sharing) / sum(u.examples for u in sharing)
        state = self.states.get(slot, self._chain.init())
        inputs = make_updates(members, round, self._seed)
        result, self.states[slot] = self._chain.update(inputs, state)
        self.log[f"slot {slot}"] = dict(result.log)
        step: Tensors = {}
        start = 0
        for name in names:
            shape = sharing[0].deltas[name].shape
            size = int(np.prod(shape))
            part = result.direction[start : start + size].reshape(shape)
            step[name] = (length * part).astype(np.float32)
            start += size
        return step

    def take_log(self) -> dict[str, Any]:
        """What CMGA saw and did since this was last asked, per slot."""
        log, self.log = self.log, {}
        return log


def _with_rule(chain: Sequence[Mapping[str, Any]], mean: RobustMean) -> Sequence[Mapping[str, Any]]:
    """The chain with a robust rule inside types, where it averages there and names none itself."""
    if mean.rule == "mean":
        return chain
    return [
        {**asdict(mean), **entry}
        if entry.get("transform") == "within_type_mean" and "rule" not in entry
        else entry
        for entry in chain
    ]


def _flat(update: ClientUpdate, names: Sequence[str]) -> Vector:
    """Some tensors of an update as one vector, in the given order."""
    if isinstance(update.deltas, Stored):
        return update.deltas.only(names).flat().astype(np.float64)
    return np.concatenate([update.deltas[name].astype(np.float64).reshape(-1) for name in names])


def _member(update: ClientUpdate, names: Sequence[str]) -> Member:
    """A client's pseudo-gradient of one slot; read when it is needed where the update is not in memory."""

    def read() -> Vector:
        vector = _flat(update, names)
        vector /= update.path_length
        return vector

    if isinstance(update.deltas, Stored):
        size = update.deltas.only(names).size
        return LazyMember(update.client_id, update.type_key, update.examples, size, read)
    return Member(update.client_id, update.type_key, read(), update.examples)
