"""From the clients' updates to one per type, to one direction, to the server's step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from heterotune_flwr.cmga.base import (
    Member,
    Transform,
    Updates,
    Vector,
    cosines,
    pairwise,
    weighted_mean,
)
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.cmga.server_optimizers import ServerOptimizer
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State


def within_type_mean(
    rule: str = "mean",
    trim: float = 0.2,
    clip: float = 1.0,
    hostile: int = 1,
    keep: int | None = None,
) -> Transform:
    """``g_m``: mean of type m's clients by examples (docs/method.md, 4.2), or a robust one (:class:`.RobustMean`)."""
    robust = RobustMean(rule, trim, clip, hostile, keep)

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        means = _type_means(updates.members, robust)
        norms = {member.key: float(np.linalg.norm(member.vector)) for member in means}
        log = updates.logged(norms=norms)
        return replace(updates, members=means, types=means, log=log), state

    return Transform("within_type_mean", dict, update)


def combine(weights: str = "equal") -> Transform:
    """``d = sum_m w_m g_m``, as long as it comes out (docs/method.md, 4.3).

    Parameters
    ----------
    weights
        ``equal``: every type counts the same, however many clients it has; ``examples``: by their numbers.

    """
    if weights not in {"equal", "examples"}:
        raise ConfigError(f"combine.weights is {weights!r}; choose equal or examples")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        members = updates.members
        shares = np.array([m.examples if weights == "examples" else 1.0 for m in members])
        shares = shares / shares.sum()
        direction = np.zeros(members[0].size)
        for member, share in zip(members, shares, strict=True):
            direction += share * member.vector
        used = dict(zip((member.key for member in members), shares.tolist(), strict=True))
        return conclude(updates, direction, weights=used), state

    return Transform("combine", dict, update)


def server_opt(
    kind: str = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Transform:
    """Server optimizer on the combined direction (docs/method.md, 4.4): :class:`.ServerOptimizer`."""
    optimizer = ServerOptimizer(kind, learning_rate, momentum, beta2, tau)

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        step, new = optimizer.step(updates.direction, state)
        return replace(updates, members=(replace(updates.members[0], vector=step),)), new

    return Transform("server_opt", dict, update)


def conclude(updates: Updates, direction: Vector, **log: Any) -> Updates:
    """The one combined member.

    Logged: cosines between the types' updates, and of the direction with each of them.
    """
    types = updates.types or _type_means(updates.members, RobustMean())
    names = [member.key for member in types]
    stacked = np.stack([*(member.vector for member in types), direction])
    found = cosines(stacked @ stacked.T)
    told = updates.logged(
        cosine_before=pairwise(names, found[:-1, :-1]),
        **log,
        agreement=dict(zip(names, found[-1, :-1].tolist(), strict=True)),
    )
    total = sum(member.examples for member in updates.members)
    combined = Member("combined", "combined", direction, total)
    return replace(updates, members=(combined,), log=told)


def _type_means(members: Iterable[Member], robust: RobustMean) -> tuple[Member, ...]:
    """One member per type, in the order of their names."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.type_key, []).append(member)
    return tuple(
        Member(key, key, _centre(group, robust), sum(member.examples for member in group))
        for key, group in sorted(groups.items())
    )


def _centre(group: list[Member], robust: RobustMean) -> Vector:
    if robust.rule == "mean":  # one after the other: very many are not in memory
        return weighted_mean(group)
    return robust([member.vector for member in group], [member.examples for member in group])
