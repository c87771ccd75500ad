"""Less weight for a type that keeps pulling away from all the others: one whose task, or data, has gone wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from heterotune_flwr.cmga.base import Transform, Updates
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.trees import State


def downweight_outliers(decay: float = 0.9, floor: float = 0.03, power: float = 8.0) -> Transform:
    """``w_m ~ w_m / (D_m + floor)^power`` with ``D_m = max(0, <R_m, R_m - mean_{b != m} R_b>)`` (our definition).

    ``R_m = EMA(g_m / |g_m|)``, bias-corrected, is where a type has been pulling for ``1 / (1 - decay)`` rounds. While
    all learn they pull together, and D is 0. Later the updates of healthy types cancel from round to round: R is short.
    A type whose answers are wrong goes on pulling its own way: R stays long and away from the others', however little
    weight it has, so the rule does not swing back. A single round's cosine does not show it: in the first rounds
    everybody learns the form of an answer, with right and wrong labels alike.

    Not in the default chain: it protects from wrong answers, and costs where nothing is wrong but the steps are too
    long (docs/results.md). End the chain with ``combine`` and ``guard: false``, for the guard would let
    no type go against its will. Two types always dissent equally: which of two is wrong nobody can tell.

    Parameters
    ----------
    decay
        How much of the old pull stays, in [0, 1). [share]
    floor
        Dissent that is normal: far below it nobody loses weight. Above 0. [squared length]
    power
        How sharply weight falls with dissent; 0: not at all. [power]

    """
    if not 0 <= decay < 1 or not floor > 0 or not power >= 0:
        raise ConfigError(
            f"downweight_outliers has decay={decay}, floor={floor}, power={power}; decay must be in [0, 1), floor "
            "above 0, power not negative"
        )

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        pulls, seen = dict(state["pulls"]), dict(state["seen"])
        for member in updates.members:
            norm = float(np.linalg.norm(member.vector))
            if norm > 0:
                old = pulls.get(member.key, np.zeros_like(member.vector))
                pulls[member.key] = decay * old + (1 - decay) * member.vector / norm
                seen[member.key] = seen.get(member.key, 0) + 1
        keys = [member.key for member in updates.members]
        long = {key: pulls[key] / (1 - decay ** seen[key]) for key in keys if key in pulls}
        dissent = {}
        for key in keys:
            others = [pull for other, pull in long.items() if other != key]
            if key in long and others:
                away = long[key] - np.mean(others, axis=0)
                dissent[key] = max(0.0, float(long[key] @ away))
        raw = np.array(
            [
                updates.weights.get(key, 1.0) / (dissent.get(key, 0.0) + floor) ** power
                for key in keys
            ]
        )
        weights = dict(zip(keys, (raw / raw.sum()).tolist(), strict=True))
        log = updates.logged(dissent=dissent, weights=weights)
        return replace(updates, weights=weights, log=log), {"pulls": pulls, "seen": seen}

    return Transform("downweight_outliers", lambda: {"pulls": {}, "seen": {}}, update)
