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
from heterotune_flwr.channels.channel import (
    Aggregated,
    Purposes,
    RunFacts,
    Unlabelled,
    Update,
)
from heterotune_flwr.channels.predictions.agreement import agreement_weights
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
    as_probabilities,
)
from heterotune_flwr.channels.predictions.token_server import TokenRounds
from heterotune_flwr.channels.text_rounds import TextRounds
from heterotune_flwr.cmga.pull import no_louder
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.payloads import Array, Payload
from heterotune_flwr.schema import MethodConfig


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
    """The server's half: asks for predictions, averages them, brings the mean.

    Of a closed label set here; on open text, of symbols at the positions of public answers, in :mod:`.token_server`.
    """

    tokens: TokenRounds | None = None

    def most_bytes(self, labels: Sequence[str], method: MethodConfig) -> int | None:
        """A byte for every text and label; on open text it depends on the answers."""
        return int(min(self.options.anchors, self.options.pool)) * len(labels) if labels else None

    def open(self, run: RunFacts) -> str | None:
        """Without a closed label set predictions are of the symbols that all vocabularies have."""
        reason = super().open(run)
        if not run.labels and reason is None:
            if not run.symbols.count:
                return "nobody knows what the vocabularies have in common: set alignment.output=vocabulary"
            self.tokens = TokenRounds(run, self.options, self.digests[self.options.pool])
            self.rounds_before = 1
        return reason

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """As :meth:`.TextRounds.purposes`."""
        if self.tokens is None:
            return super().purposes(server_round, type_key)
        fits = self.tokens.fits(self.group(type_key), type_key)
        return ["predict", "fit"] if fits else ["predict"]

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """As :meth:`.TextRounds.request`."""
        if self.tokens is None:
            return super().request(server_round, client_id, purposes)
        guest = "unlabelled" in purposes
        if not guest and "train" not in purposes:
            return None
        group = self.group(self.run.clients[client_id].type_key)
        return self.tokens.request(client_id, group, guest).to_payload()

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """As :meth:`.TextRounds.unlabelled`."""
        if self.tokens is None:
            return super().unlabelled(server_round, type_key)
        if not self.tokens.fits(self.group(type_key), type_key):
            return None
        return Unlabelled(self.options.guest_steps, self.options.anchors)

    def bring(
        self, request: DistillationRequest, known: Array, places: list[int]
    ) -> DistillationRequest:
        """Probabilities as targets."""
        return dataclasses.replace(request, targets=known[places])

    def state_dict(self) -> State:
        """The next round's targets."""
        if self.tokens is not None:
            return self.tokens.state_dict()
        return {"targets": self.known, "due": self.due}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        if self.tokens is not None:
            self.tokens.load_state_dict(state)
            return
        self.known, self.due = dict(state["targets"]), state["due"]

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Average what clients predict on the next round's anchors; without usable ones it has no targets."""
        if self.tokens is not None:
            return self.tokens.aggregate(replies, self.groups(list(replies)))
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
