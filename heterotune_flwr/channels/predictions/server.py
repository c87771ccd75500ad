"""Predictions: what clients of different models predict on public texts, averaged, is what each of them learns from.

A bank at one place of the network carries across types what that place can express. Predictions carry what a *whole*
model has learnt, whatever it has trained and wherever, and have the same form in every model. No label, no text and no
private number is in them but through what was learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import entropies
from heterotune_flwr.channels.channel import Aggregated, RunFacts, Update
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
    as_probabilities,
)
from heterotune_flwr.channels.text_rounds import TextRounds
from heterotune_flwr.cmga.pull import no_louder
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.payloads import Array, Payload
from heterotune_flwr.schema import MethodConfig

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


def confidence_weighted_mean(
    predictions: Sequence[Array], shares: Sequence[float], entropy_power: float
) -> tuple[NDArray[np.float64], list[float]]:
    """Average label probabilities (``n x C`` each), louder where a client is sure of itself.

    ``w_i(n) ~ shares_i exp(-entropy_power H(p_i(n)))`` with H the entropy in nats, normalised on every anchor n;
    nobody is much louder than the median client (:func:`...cmga.pull.no_louder`).
    Returns the mean (``n x C``) and every client's share in it, averaged over anchors.
    """
    said = np.asarray(predictions, np.float64)
    weights = np.asarray(shares)[:, None] * np.exp(-entropy_power * entropies(said))
    weights = no_louder(weights)
    weights = weights / weights.sum(axis=0)
    mean: NDArray[np.float64] = np.einsum("in,inc->nc", weights, said)
    return mean, [float(share) for share in weights.mean(axis=1)]


def sinkhorn_balance(targets: NDArray[np.float64], iterations: int) -> NDArray[np.float64]:
    """Make every label equally frequent over the anchors: how they differ is kept, not how frequent a label is.

    Rows and columns in turn, as in Sinkhorn's algorithm (arXiv 1306.0895). Whatever label the anchors happen to
    resemble would otherwise be taught as frequent, and more so every round (distribution alignment, arXiv 1911.09785).
    """
    for _ in range(iterations):
        targets = targets / np.maximum(targets.mean(axis=0, keepdims=True), 1e-9)
        targets = targets / targets.sum(axis=1, keepdims=True)
    return targets


class PredictionEnsemble(TextRounds[Array]):
    """The server's half: asks for predictions, averages them, brings the mean."""

    def most_bytes(self, labels: Sequence[str], method: MethodConfig) -> int | None:
        """A byte for every text and label."""
        return int(min(self.options.anchors, self.options.pool)) * len(labels)

    def open(self, run: RunFacts) -> str | None:
        """Probabilities are over a closed label set."""
        if not run.labels:
            return "the task has no closed label set (data.labels, train.loss); open text has the channel answers"
        return super().open(run)

    def bring(
        self, request: DistillationRequest, known: Array, places: list[int]
    ) -> DistillationRequest:
        """Probabilities as targets."""
        return dataclasses.replace(request, targets=known[places])

    def state_dict(self) -> State:
        """The next round's targets."""
        return {"targets": self.known, "due": self.due}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self.known, self.due = dict(state["targets"]), state["due"]

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Average what clients predict on the next round's anchors; without usable ones it has no targets."""
        usable: dict[str, Array] = {}
        refused: dict[str, str] = {}
        for client_id, payload in replies.items():
            try:
                values = None if payload is None else Said.from_payload(payload).predictions
                usable[client_id] = as_probabilities(
                    values, self.asked(server_round), len(self.run.labels)
                )
            except ExchangeError as error:
                refused[client_id] = str(error)
        self.known, self.due = {}, server_round + 1
        if not usable:
            return Aggregated({}, refused)
        shares: dict[str, float] = {}
        means = []
        for group, members in self.groups(list(usable)).items():
            predictions = [usable[client_id] for client_id in members]
            weights = agreement_weights(predictions, self.options.agreement_power)
            mean, weights = confidence_weighted_mean(
                predictions, weights, self.options.entropy_power
            )
            self.known[group] = sinkhorn_balance(mean, self.options.balance).astype(np.float32)
            means.append(mean)
            shares |= dict(zip(members, weights, strict=True))
        log = {
            "agreement_weights": self.shares_by_type(shares),
            "entropy": float(entropies(np.stack(means)).mean()),
            "clients": len(usable),
        }
        return Aggregated(log, refused)


Channel = PredictionEnsemble
