"""Averages of distributions over symbols that are cut off behind the likeliest (numpy only)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from heterotune_flwr.alignment.public_texts import entropies
from heterotune_flwr.channels.predictions.token_record import (
    MOST_POSITIONS,
    NOTHING,
    TOP,
    Floats,
    Ints,
    TopSymbols,
    normalised,
)
from heterotune_flwr.cmga.pull import LOUDEST
from heterotune_flwr.protocol.payloads import Array

#: Symbols are compared in so many bins, on so many positions.
_BINS, _COMPARED = 256, 512


def in_common(said: Mapping[str, Sequence[TopSymbols]]) -> Ints:
    """Keys of the positions that every type has, sorted; ``said``: type -> what its clients say.

    Honest clients of a type have the same. Of an answer's :data:`MOST_POSITIONS` are taken, those that most say.
    """
    found: Ints | None = None
    for clients in said.values():
        own, voices = np.unique(
            np.concatenate([client.keys for client in clients]), return_counts=True
        )
        answers = own >> 32
        order = np.lexsort((-voices, answers))
        kept = np.arange(len(own)) - np.searchsorted(answers, answers) < MOST_POSITIONS
        own = np.sort(own[order[kept]])
        found = own if found is None else np.intersect1d(found, own, assume_unique=True)
    return np.zeros(0, np.int64) if found is None else found


def binned(said: TopSymbols, keys: Ints) -> Array:
    """A client's distributions at some positions as ``n x 256`` shares, to compare clients; rows of 0: it says none."""
    keys = keys[:: max(1, len(keys) // _COMPARED)]
    found = np.zeros((len(keys), _BINS), np.float32)
    here = said.only(np.isin(said.keys, keys))
    rows = np.searchsorted(keys, here.keys)
    np.add.at(found, (rows[:, None], here.numbers % _BINS), here.chances)
    return found


def mean_of(
    said: Sequence[TopSymbols], shares: Sequence[float], entropy_power: float, keys: Ints
) -> tuple[TopSymbols, list[float]]:
    """Average distributions at some positions, louder where a client is sure of itself.

    ``w_i(n) ~ shares_i exp(-entropy_power H(p_i(n)))`` with H the entropy in nats; nobody is much louder than the
    median voice. Returns the mean, cut off again, and every client's share in it, averaged over positions.
    """
    here = [one.only(np.isin(one.keys, keys)) for one in said]
    weights = [
        s * np.exp(-entropy_power * entropies(one.chances))
        for s, one in zip(shares, here, strict=True)
    ]
    all_weights = np.concatenate([*weights, np.zeros(0)])
    most = LOUDEST * float(np.median(all_weights)) if len(all_weights) else 0.0
    weights = [np.minimum(own, most) for own in weights]
    totals = np.zeros(len(keys))
    for one, own in zip(here, weights, strict=True):
        np.add.at(totals, np.searchsorted(keys, one.keys), own)
    told = [
        float((own / totals[np.searchsorted(keys, one.keys)]).sum() / max(len(keys), 1))
        for one, own in zip(here, weights, strict=True)
    ]
    return _merged(here, weights), told


def moving(before: TopSymbols, now: TopSymbols) -> TopSymbols:
    """The mean of two rounds' targets where both have one; of this round alone elsewhere."""
    kept = before.only(np.isin(before.keys, now.keys))
    return _merged([kept, now], [np.ones(len(kept)), np.ones(len(now))])


def _merged(said: Sequence[TopSymbols], weights: Sequence[Floats]) -> TopSymbols:
    """Weighted sums of several distributions, position by position: the likeliest symbols, normalised."""
    said, weights = list(said), list(weights)
    if not any(len(one) for one in said):
        return NOTHING
    keys = np.repeat(np.concatenate([one.keys for one in said]), TOP)
    numbers = np.concatenate([one.numbers.ravel() for one in said])
    chances = np.concatenate(
        [(own[:, None] * one.chances).ravel() for own, one in zip(weights, said, strict=True)]
    )
    places, rows = np.unique(keys, return_inverse=True)
    pairs, where = np.unique((rows.astype(np.int64) << 16) | numbers, return_inverse=True)
    mass = np.bincount(where.ravel(), chances, minlength=len(pairs))
    rows, numbers = pairs >> 16, pairs & 0xFFFF
    order = np.lexsort((numbers, -mass, rows))
    rows, numbers, mass = rows[order], numbers[order], mass[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = (rank < TOP) & (mass > 0)
    found = np.zeros((len(places), TOP), np.int64), np.zeros((len(places), TOP))
    found[0][rows[kept], rank[kept]] = numbers[kept]
    found[1][rows[kept], rank[kept]] = mass[kept]
    return normalised(TopSymbols(places >> 32, (places >> 8) & 0xFFFFFF, places & 255, *found))
