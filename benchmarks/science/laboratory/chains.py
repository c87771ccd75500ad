"""The product's own aggregation chains in the laboratory, one server per run and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heterotune_flwr.cmga import (
    DEFAULT_CHAIN,
    MEAN_CHAIN,
    Member,
    Transform,
    Updates,
    build_chain,
    make_updates,
)
from heterotune_flwr.cmga.base import State, conflict_rate, gram, weighted_mean
from heterotune_flwr.cmga.combining import conclude

#: Name -> chain, as a user would write it.
CHAINS = {
    "mean chain": MEAN_CHAIN,
    "cmga": DEFAULT_CHAIN,
    "equal norms": [{"_component_": f"{__name__}.equal_norms"}],
    "pcgrad": [DEFAULT_CHAIN[0], {"transform": "pcgrad"}, *DEFAULT_CHAIN[1:]],
    "cagrad": [DEFAULT_CHAIN[0], {"transform": "cagrad"}],
}


def equal_norms(decay: float = 0.9) -> Transform:
    """CMGA's default until the clip: types' means over their norms' moving averages, as long as the plain mean."""

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        averages = dict(state["norms"])
        units = []
        for key in sorted({member.type_key for member in updates.members}):
            mean = weighted_mean(m for m in updates.members if m.type_key == key)
            norm = float(np.linalg.norm(mean))
            if norm > 0:
                averages[key] = decay * averages.get(key, norm) + (1 - decay) * norm
                mean = mean / averages[key]
            units.append(mean)
        direction = np.mean(units, axis=0)
        length = float(np.linalg.norm(direction))
        wanted = float(np.linalg.norm(weighted_mean(updates.members)))
        direction = direction * (wanted / length if length > 0 else 0.0)
        return conclude(updates, direction), {"norms": averages}

    return Transform("equal_norms", lambda: {"norms": {}}, update)


@dataclass(frozen=True)
class Clients:
    """Per client: whether it shares across types, its run, its type, steps times rate."""

    across: Tensor
    runs: Tensor
    types: Tensor
    length: Tensor


class ChainServers:
    """One chain with its own state per run.

    ``gates``: whether the gates are shared like the experts. ``conflicts``: share of a run's pairs of clients that pull
    apart, one number per round and run.
    """

    def __init__(self, name: str, gates: bool = True) -> None:
        self._gates = gates
        self._chain = build_chain(CHAINS[name])
        self._states: dict[int, State] = {}
        self._round = 0
        self.conflicts: list[list[float]] = []

    @torch.no_grad()
    def step(
        self,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        plain: dict[str, Tensor],
        clients: Clients,
    ) -> dict[str, Tensor]:
        """What clients share across types takes the chain's step; all else is as in ``plain``."""
        self._round += 1
        self.conflicts.append([])
        names = [name for name in end if self._gates or not name.startswith("gate")]
        result = {key: value.clone() for key, value in plain.items()}
        for run in clients.runs[clients.across].unique().tolist():
            chosen = (clients.across & (clients.runs == run)).nonzero().flatten()
            length = float(clients.length[chosen[0]])
            flat = torch.cat([(end[n] - start[n])[chosen].flatten(1) for n in names], dim=1)
            members = [
                Member(f"c{i}", f"t{clients.types[i]}", vector / length, 1.0)
                for i, vector in zip(chosen.tolist(), flat.double().numpy(), strict=True)
            ]
            self.conflicts[-1].append(conflict_rate(gram(members)))
            state = self._states.get(run, self._chain.init())
            inputs = make_updates(members, self._round, run)
            updates, self._states[run] = self._chain.update(inputs, state)
            step, at = torch.from_numpy(length * updates.direction).float(), 0
            for name in names:
                shape = end[name].shape[1:]
                size = shape.numel()
                result[name][chosen] = start[name][chosen[0]] + step[at : at + size].reshape(shape)
                at += size
        return result
