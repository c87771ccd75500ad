"""The first half of the chain: one update per type, on one scale, with one weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga.base import (
    Member,
    Transform,
    Updates,
    Vector,
    generator,
    gram,
    weighted_mean,
)
from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State


def within_type_mean(
    rule: str = "mean",
    trim: float = 0.2,
    clip: float = 1.0,
    hostile: int = 1,
    keep: int | None = None,
) -> Transform:
    """``g_m``: example-weighted mean of type m's clients (docs/method.md, 4.1), or a robust one (:class:`.RobustMean`).

    With a rule, the reference whose norm later transforms take is the mean of the types' robust means.
    """
    robust = RobustMean(rule, trim, clip, hostile, keep)

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        groups: dict[str, list[Member]] = {}
        for member in updates.members:
            groups.setdefault(member.type_key, []).append(member)
        means = tuple(
            Member(key, key, centre(key, group, updates), sum(member.examples for member in group))
            for key, group in sorted(groups.items())
        )
        norms = {member.key: float(np.linalg.norm(member.vector)) for member in means}
        changed = replace(updates, members=means, types=means, log=updates.logged(norms=norms))
        if rule != "mean":
            changed = replace(changed, reference=weighted_mean(means))
        return changed, state

    def centre(key: str, group: list[Member], updates: Updates) -> Vector:
        if rule == "mean":
            known = updates.means.get(key) if updates.members is updates.clients else None
            return weighted_mean(group) if known is None else known
        return robust([member.vector for member in group], [member.examples for member in group])

    return Transform("within_type_mean", dict, update)


def equalise_norms(decay: float = 0.9) -> Transform:
    """``g^_m = g_m / EMA(|g_m|)``: backbones of different width and bits differ in scale (4.2).

    The average starts at the first norm a type shows, so scaling all updates of one type by a
    constant changes nothing. A zero update stays zero and does not enter the average.

    Parameters
    ----------
    decay
        How much of the old average stays, in [0, 1). [share]

    """
    if not 0 <= decay < 1:
        raise ConfigError(f"equalise_norms.decay is {decay}, it must be in [0, 1)")

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        averages = dict(state["norms"])
        members = []
        for member in updates.members:
            norm = float(np.linalg.norm(member.vector))
            if norm > 0:
                old = averages.get(member.key, norm)
                averages[member.key] = decay * old + (1 - decay) * norm
                member = replace(member, vector=member.vector / averages[member.key])
            members.append(member)
        return replace(updates, members=tuple(members)), {"norms": averages}

    return Transform("equalise_norms", lambda: {"norms": {}}, update)


def _half_agreement(clients: list[Member], splits: int, updates: Updates) -> float | None:
    """Mean cosine of the two halves of a type's clients over random splits; None below two."""
    if len(clients) < 2:
        return None
    products = gram(clients)
    examples = np.array([member.examples for member in clients])
    rng = generator(updates, "halves", clients[0].type_key)
    values = []
    for _ in range(splits if len(clients) > 2 else 1):
        order = rng.permutation(len(clients))
        first = np.zeros(len(clients))
        chosen = order[: len(clients) // 2]
        first[chosen] = examples[chosen]
        second = np.where(first > 0, 0.0, examples)
        scale = np.sqrt((first @ products @ first) * (second @ products @ second))
        values.append(float(first @ products @ second / scale) if scale > 0 else 0.0)
    return float(np.mean(values))


def _capped(weights: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Normalise to sum 1 with no entry above ``max(cap, 1 / M)``; the surplus goes to the rest."""
    cap = max(cap, 1.0 / len(weights))
    result = weights / weights.sum()
    for _ in range(len(weights)):
        over = result > cap
        rest = result[~over].sum()
        if not over.any() or rest <= 0:
            break
        result = np.where(over, cap, result * (1 - cap * over.sum()) / rest)
    result = np.minimum(result, cap)
    return np.asarray(result / result.sum())


def weigh_reliability(
    decay: float = 0.9,
    floor: float = 0.02,
    staleness: float = 0.9,
    cap: float = 0.5,
    splits: int = 8,
) -> Transform:
    """``w_m ~ rel_m * staleness^age_m``, normalised, none above ``cap`` (docs/method.md, 4.3).

    With c >= ``floor`` the mean cosine between two random halves of a type's n clients, the
    Spearman-Brown relation gives the reliability of one client, ``rho = 2 c / (n - (n - 2) c)``
    (averaged over rounds), and of the mean over the n clients of this round,
    ``rel = n rho / (1 + (n - 1) rho)``. A type with one client in the round gives no evidence: it
    keeps the rho it earned before, and without a past it gets the median of the others (rel = 1
    where nobody has any). ``age`` is the number of rounds a type was absent before this one: its
    record is that old.

    Parameters
    ----------
    decay
        How much of a type's old reliability stays. [share]
    floor
        Least agreement of two halves that is reckoned with. [cosine]
    staleness
        Factor on a type's weight for every round it was absent. [factor]
    cap
        Most weight of one type. [share]
    splits
        Random halves that agreement is averaged over. [halves]

    """

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        earned: dict[str, float] = dict(state["rho"])
        seen: dict[str, int] = dict(state["seen"])
        counts: dict[str, int] = {}
        for member in updates.members:
            clients = [client for client in updates.clients if client.type_key == member.key]
            counts[member.key] = n = len(clients)
            agreement = _half_agreement(clients, splits, updates)
            if agreement is not None:
                c = max(agreement, floor)
                value = 2 * c / (n - (n - 2) * c)
                old = earned.get(member.key, value)
                earned[member.key] = decay * old + (1 - decay) * value
        present = [member.key for member in updates.members]
        known = [earned[key] for key in present if key in earned]
        neutral = float(np.median(known)) if known else 1.0
        rho = {key: earned.get(key, neutral) for key in present}
        reliability = {
            key: counts[key] * rho[key] / (1 + (counts[key] - 1) * rho[key]) for key in present
        }
        ages = {
            key: max(updates.round - 1 - seen.get(key, updates.round - 1), 0) for key in present
        }
        raw = np.array([reliability[key] * staleness ** ages[key] for key in present])
        weights = dict(zip(present, _capped(raw, cap).tolist(), strict=True))
        seen.update(dict.fromkeys(present, updates.round))
        log = updates.logged(reliability=reliability, weights=weights)
        changed = replace(updates, reliability=reliability, weights=weights, log=log)
        return changed, {"rho": earned, "seen": seen}

    return Transform("weigh_reliability", lambda: {"rho": {}, "seen": {}}, update)
