"""CMGA's first step: no client's update is longer than the median one."""

from __future__ import annotations

import numpy as np

from heterotune_flwr.cmga.base import Transform, Updates
from heterotune_flwr.cmga.pull import shares_of_length
from heterotune_flwr.exchange.trees import State


def clip_to_median() -> Transform:
    """``g_i <- g_i min(1, c / |g_i|)``, c the median length over the round's clients (docs/method.md, 4.1).

    Over clients of *all* types, so a type that is too loud as a whole is shortened too. Any mean of what is left is at
    most c long. Were c fixed, one client would move it by at most its weight times 2 c; docs/theory.md (7) has what its
    say in c adds.
    """

    def update(updates: Updates, state: State) -> tuple[Updates, State]:
        lengths = np.array([np.linalg.norm(member.vector) for member in updates.members])
        shares = shares_of_length(lengths)
        members = tuple(
            member.scaled(float(share))
            for member, share in zip(updates.members, shares, strict=True)
        )
        longest = float((lengths * shares).max())
        log = updates.logged(clip_length=longest, clipped=int((shares < 1).sum()))
        return Updates(updates.round, updates.seed, members, updates.types, log), state

    return Transform("clip_to_median", dict, update)
