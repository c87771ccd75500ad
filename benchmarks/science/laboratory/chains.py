"""The product's own aggregation chains in the laboratory, one server per run and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heterotune_flwr.cmga import (
    DEFAULT_CHAIN,
    GUARDED_CHAIN,
    MEAN_CHAIN,
    Member,
    build_chain,
    make_updates,
)
from heterotune_flwr.cmga.base import State

_HEAD = [{"transform": "within_type_mean"}, {"transform": "equalise_norms"}]
#: Name -> chain, as a user would write it.
CHAINS = {
    "mean chain": MEAN_CHAIN,
    "cmga": DEFAULT_CHAIN,
    "guarded": GUARDED_CHAIN,
    "guarded without guard": [*GUARDED_CHAIN[:-2], {"transform": "combine", "guard": False}],
    "dissent": [
        *_HEAD,
        {"transform": "downweight_outliers"},
        {"transform": "combine", "guard": False},
    ],
    "pcgrad": [
        _HEAD[0],
        {"transform": "pcgrad"},
        {"transform": "combine", "weights": "equal", "guard": False},
    ],
    "cagrad": [_HEAD[0], {"transform": "cagrad"}],
    "fedmgda+": [_HEAD[0], {"transform": "fedmgda_plus"}],
    "aligned-mtl": [_HEAD[0], {"transform": "aligned_mtl"}],
    "ties": [_HEAD[0], {"transform": "ties"}],
}
#: CMGA built up step by step, for the ablation.
STEPS = ("mean chain", "cmga", "+ reliability", "guarded without guard", "guarded")
CHAINS["+ reliability"] = [
    *_HEAD,
    {"transform": "weigh_reliability"},
    {"transform": "combine", "guard": False},
]


@dataclass(frozen=True)
class Clients:
    """Per client: whether it shares across types, its run, its type, steps times rate."""

    across: Tensor
    runs: Tensor
    types: Tensor
    length: Tensor


class ChainServers:
    """One chain with its own state per run."""

    def __init__(self, name: str) -> None:
        self._chain = build_chain(CHAINS[name])
        self._states: dict[int, State] = {}
        self._round = 0

    @torch.no_grad()
    def step(
        self,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        plain: dict[str, Tensor],
        clients: Clients,
    ) -> dict[str, Tensor]:
        """The experts of clients that share across types take the chain's step; all else as ``plain``."""
        self._round += 1
        names = [name for name in end if not name.startswith("gate")]
        result = {key: value.clone() for key, value in plain.items()}
        for run in clients.runs[clients.across].unique().tolist():
            chosen = (clients.across & (clients.runs == run)).nonzero().flatten()
            length = float(clients.length[chosen[0]])
            flat = torch.cat([(end[n] - start[n])[chosen].flatten(1) for n in names], dim=1)
            members = [
                Member(f"c{i}", f"t{clients.types[i]}", vector / length, 1.0)
                for i, vector in zip(chosen.tolist(), flat.double().numpy(), strict=True)
            ]
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
