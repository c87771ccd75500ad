"""Predictions: what clients of different models predict on public texts, averaged, is what each of them learns from.

A bank at one place of the network carries across types what that place can express. Predictions carry what a *whole*
model has learnt, whatever it has trained and wherever, and have the same form in every model. No label, no text and no
private number is in them but through what was learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import entropies, round_anchors
from heterotune_flwr.channels.channel import (
    Aggregated,
    Purposes,
    RunFacts,
    ServerChannel,
    Unlabelled,
    Update,
)
from heterotune_flwr.channels.predictions.agreement import agreement_weights
from heterotune_flwr.channels.predictions.options import PredictionOptions
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
    as_probabilities,
)
from heterotune_flwr.channels.predictions.rounds import Rounds
from heterotune_flwr.channels.predictions.token_server import TokenRounds
from heterotune_flwr.cmga.pull import no_louder
from heterotune_flwr.config.options import read_options
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


class LabelRounds(Rounds):
    """The server's half for a closed label set: what clients predict on a round's texts all fit in the next."""

    def open(self, run: RunFacts) -> str | None:
        """As :meth:`.Rounds.open`."""
        #: Targets by type; under "" where all learn from the same. They are of the texts of one round.
        self.known: dict[str, Array] = {}
        self.due = 0
        return super().open(run)

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """Clients predict in every round, and fit where something is known of it."""
        empty = self._of_round(server_round, type_key).is_empty
        return ["predict"] if empty else ["predict", "fit"]

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """What clients are asked in a training; guests are brought all that was predicted for them."""
        type_key = self.run.clients[client_id].type_key
        if "unlabelled" in purposes:
            return self._for_guests(server_round, type_key).to_payload()
        return self._of_round(server_round, type_key).to_payload() if "train" in purposes else None

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """As many steps as the options say, where there is something to learn."""
        request = self._for_guests(server_round, type_key)
        return None if request.is_empty else Unlabelled(self.options.guest_steps, request.count)

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
                    values, self._wanted(server_round), len(self.run.labels)
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

    def state_dict(self) -> State:
        """The next round's targets."""
        return {"targets": self.known, "due": self.due}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self.known, self.due = dict(state["targets"]), state["due"]

    def _wanted(self, server_round: int) -> int:
        """Anchors that clients predict on in a round: more in the last one, where guests learn from them."""
        last = self.run.guests and server_round == self.run.rounds
        return self.options.guest_anchors if last else self.options.anchors

    def _of_round(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a client is asked in a round; without targets where nobody it learns from has predicted them."""
        options, known = self.options, self._known_to(server_round, type_key)
        if known is not None and len(known) > options.anchors:
            # A run that goes on has it of more, for its guests.
            known = known[round_anchors(options.pool, options.anchors, self.run.seed, server_round)]
        return self._about(options.pool, options.anchors, self._wanted(server_round), known)

    def _for_guests(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a guest fits after the last round, the one before ``server_round``: all that was predicted for it.

        Nothing, where nobody knew that it was the last round, and predictions are of an ordinary one's anchors.
        """
        known = self._known_to(server_round, type_key)
        if known is None or len(known) not in self.digests:
            return self._about(1, 1, 0, None)
        return self._about(len(known), len(known), 0, known)

    def _known_to(self, server_round: int, type_key: str) -> Array | None:
        return self.known.get(self.group(type_key)) if self.due == server_round else None

    def _about(
        self, pool: int, count: int, wanted: int, targets: Array | None
    ) -> DistillationRequest:
        """A request as the options say; one about a list that is none of ours has no digest."""
        digest, options = self.digests.get(max(pool, wanted), ""), self.options
        return DistillationRequest(
            digest, pool, count, options.weight, targets, options.batch, wanted
        )


class Channel(ServerChannel):
    """Predictions of labels, or on open text of symbols at the positions of public answers (:mod:`.token_server`)."""

    options: PredictionOptions
    teaches = pools = True

    @classmethod
    def read(cls, given: Any) -> PredictionOptions:
        """See :class:`.PredictionOptions`."""
        return read_options(PredictionOptions, given, cls.name)

    def most_bytes(self, labels: Sequence[str], method: MethodConfig) -> int | None:
        """A byte for every text and label; on open text it depends on the answers."""
        return int(min(self.options.anchors, self.options.pool)) * len(labels) if labels else None

    def open(self, run: RunFacts) -> str | None:
        """As the half that the task asks."""
        self.half = (LabelRounds if run.labels else TokenRounds)(self.options)
        self.rounds_before = self.half.rounds_before
        return self.half.open(run)

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """As the half at work."""
        return self.half.purposes(server_round, type_key)

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """As the half at work."""
        return self.half.request(server_round, client_id, purposes)

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """As the half at work."""
        return self.half.unlabelled(server_round, type_key)

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """As the half at work."""
        return self.half.aggregate(server_round, replies, updates)

    def state_dict(self) -> State:
        """As the half at work."""
        return self.half.state_dict()

    def load_state_dict(self, state: State) -> None:
        """As the half at work."""
        self.half.load_state_dict(state)
