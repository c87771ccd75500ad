"""Who agrees with the others is heard more (numpy only)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heterotune_flwr.protocol.payloads import Array

#: A client whose predictions have nothing to do with the others' still gets this much of a share.
_FLOOR = 0.02


def agreement_weights(predictions: Sequence[Array], agreement_power: float) -> list[float]:
    """Share of every client in the mean, from how much it agrees with the mean of the others.

    ``w_i ~ max(corr(p_i, mean_{j != i} p_j), 0.02)^agreement_power`` with predictions ``n x C`` centred per label, so
    that agreeing on what is frequent everywhere does not count. With one client, or ``agreement_power`` 0, all are
    equal.
    """
    count = len(predictions)
    if count < 3 or not agreement_power:  # two always agree with each other equally
        return [1.0 / count] * count
    centred = [np.asarray(p, np.float64) - p.mean(axis=0, dtype=np.float64) for p in predictions]
    total = np.sum(centred, axis=0)
    weights = []
    for own in centred:
        others = total - own
        scale = float(np.linalg.norm(own) * np.linalg.norm(others))
        agreement = float((own * others).sum()) / scale if scale > 0 else 0.0
        weights.append(max(agreement, _FLOOR) ** agreement_power)
    return [weight / sum(weights) for weight in weights]
