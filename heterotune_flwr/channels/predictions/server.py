"""Consensus: what clients of different models predict on public anchors, averaged, is what each of them learns from.

A bank at one place of the network carries across types what that place can express. Predictions carry what a *whole*
model has learnt, whatever it has trained and wherever, and have the same form in every model. No label, no text and no
private number is in them but through what was learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.public_texts import (
    anchor_digest,
    entropies,
    load_anchors,
    round_anchors,
)
from heterotune_flwr.channels.predictions.record import (
    MOST_FOCUS,
    DistillationRequest,
    as_probabilities,
)
from heterotune_flwr.cmga.pull import no_louder
from heterotune_flwr.config.options import check_keys, check_number, check_scope
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.schema import AlignmentConfig

Array = NDArray[np.float32]
T = TypeVar("T")
S = TypeVar("S", bound=Sized)

#: A client whose predictions have nothing to do with the others' still gets this much of a voice.
_FLOOR = 0.02


@dataclass(frozen=True)
class PredictionOptions:
    """Options of a strategy's ``consensus``.

    Attributes
    ----------
    anchors
        Anchors a round is about: ``anchors x C`` bytes each way per client-round.
    pool
        They are drawn from the first ``pool`` of ``alignment.anchors``, whose frozen states clients keep.
    weight
        Of the anchors' loss beside the loss on own examples.
    agreement_power
        A client's voice is its agreement with the others (correlation of its predictions with the mean of the other
        clients') to this power; 0: every client's is the same.
    entropy_power
        On each anchor a client's voice is multiplied by ``exp(-entropy_power x entropy of what it predicts there)``:
        who knows speaks. 0: no difference; at 1 the surest is heard at most C times as loud as one that has no idea.
    balance
        Rounds of :func:`sinkhorn_balance` on the targets; 0: none.
    batch
        Anchors in every training step beside the client's examples; 0: as many as examples (``train.batch_size``).
    informativeness_power
        Clients draw the anchors of a step with chances ``~ (log C - entropy of the target)^informativeness_power``, in
        nats: what nobody knows teaches nothing. 0: all alike.
    pool_over
        Whose predictions are averaged for a client: ``all``, or those of its own ``type``, where nothing crosses types.
    answers
        Whether clients of an open-text task exchange answers in words (:mod:`..answers.server`); without it there is no
        consensus there. A closed label set exchanges probabilities, whatever it says.
    guest_anchors
        Where there are guests (clients without examples), how many anchors everybody predicts on in the last round, for
        them to learn from: more than the pool, or 0 for as many.
    guest_steps
        Steps on these anchors that guests take after the last round.

    """

    anchors: int = 256
    pool: int = 1024
    weight: float = 1.0
    agreement_power: float = 1.0
    entropy_power: float = 1.0
    balance: int = 5
    batch: int = 0
    informativeness_power: float = 0.0
    pool_over: str = "all"
    answers: bool = False
    guest_anchors: int = 0
    guest_steps: int = 480

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> PredictionOptions:
        """Read a YAML entry (ConfigError names what is wrong)."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys("predictions", given, known)
        for key, value in given.items():
            if key == "pool_over":
                check_scope("predictions", value)
                continue
            if key == "answers":
                if not isinstance(value, bool):
                    raise ConfigError(f"predictions.answers is {value!r}; true or false is needed")
                continue
            counted = ("anchors", "pool", "guest_steps")
            whole = key in (*counted, "balance", "batch", "guest_anchors")
            check_number(f"predictions.{key}", value, whole, least=1 if key in counted else 0)
        options = cls(**given)
        if options.informativeness_power > MOST_FOCUS:
            raise ConfigError(
                f"predictions.informativeness_power is {options.informativeness_power!r}; {MOST_FOCUS:g} at most"
            )
        if options.anchors > options.pool:
            raise ConfigError(
                f"predictions.anchors is {options.anchors}, more than the {options.pool} of predictions.pool"
            )
        return options

    @classmethod
    def optional(cls, given: Mapping[str, Any] | None) -> PredictionOptions | None:
        """The same of an entry that may be null, for none."""
        return None if given is None else cls.read(given)


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


class PredictionEnsemble:
    """The server's side: hands out lessons, hears predictions.

    Parameters
    ----------
    options
        See :class:`PredictionOptions`.
    alignment
        Names the anchors.
    seed
        The run's, of the anchors of every round.

    Raises
    ------
    DataError
        There are no anchors. Where there are fewer than the options say, all of them are used.

    """

    def __init__(
        self, options: PredictionOptions, alignment: AlignmentConfig, seed: int = 0
    ) -> None:
        most = max(options.pool, options.guest_anchors)
        texts = load_anchors(dataclasses.replace(alignment, count=most))
        pool = min(options.pool, len(texts))
        self.options = dataclasses.replace(
            options, pool=pool, anchors=min(options.anchors, pool), guest_anchors=len(texts)
        )
        self.seed = seed
        #: Identity of the pool, and of all anchors that guests learn from.
        self.digests = {pool: anchor_digest(texts[:pool]), len(texts): anchor_digest(texts)}
        #: By type; under "" where all learn from the same.
        self._targets: dict[str, Array] = {}
        self._due = 0
        #: The last round, where guests learn after it.
        self.closes_after: int | None = None

    def asked(self, server_round: int) -> int:
        """Anchors that clients predict on in a round: more in the last one, where guests learn from them."""
        options = self.options
        return options.guest_anchors if server_round == self.closes_after else options.anchors

    def state_dict(self) -> State:
        """The next round's targets."""
        return {"targets": self._targets, "due": self._due}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self._targets, self._due = dict(state["targets"]), state["due"]

    def _group(self, type_key: str) -> str:
        return type_key if self.options.pool_over == "type" else ""

    def lesson(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a client is asked in a round; without targets where nobody it learns from predicted on its anchors."""
        targets = self._due_for(server_round, type_key, self._targets)
        if targets is not None:
            targets = targets[self._places(server_round, targets)]
        return dataclasses.replace(self._lesson(server_round), targets=targets)

    def guest_request(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a guest fits after the last round, the one before ``server_round``: all that was predicted for it.

        Nothing, where nobody knew that it was the last round, and predictions are of an ordinary one's anchors.
        """
        targets = self._due_for_guests(server_round, type_key, self._targets)
        return dataclasses.replace(self._lesson_for_guests(targets), targets=targets)

    def _due_for_guests(self, server_round: int, type_key: str, what: Mapping[str, S]) -> S | None:
        """The same of a guest, which learns from all anchors or none."""
        found = self._due_for(server_round, type_key, what)
        return found if found is not None and len(found) in self.digests else None

    def _due_for(self, server_round: int, type_key: str, what: Mapping[str, T]) -> T | None:
        """What a client of a type may learn in a round."""
        return what.get(self._group(type_key)) if self._due == server_round else None

    def _places(self, server_round: int, taught: Sized) -> list[int]:
        """Where the round's anchors lie in what was predicted: a run that goes on has it of more, for its guests."""
        options, count = self.options, len(taught)
        if count <= options.anchors:
            return list(range(count))
        return round_anchors(options.pool, options.anchors, self.seed, server_round)

    def _lesson(self, server_round: int) -> DistillationRequest:
        options = self.options
        return self._about(options.pool, options.anchors, self.asked(server_round))

    def _lesson_for_guests(self, taught: Sized | None) -> DistillationRequest:
        """A lesson that asks for nothing, about as many anchors as ``taught`` says something of."""
        count = 1 if taught is None else len(taught)
        return self._about(count, count, asked=0)

    def _about(self, pool: int, count: int, asked: int) -> DistillationRequest:
        """A lesson as the options say, without targets; one about a list that is none of ours has no digest."""
        options = self.options
        lesson = DistillationRequest(
            "",
            pool,
            count,
            options.weight,
            batch=options.batch,
            asked=asked,
            informativeness_power=options.informativeness_power,
        )
        return dataclasses.replace(lesson, digest=self.digests.get(lesson.extent, ""))

    def _groups(self, client_ids: Sequence[str], types: Mapping[str, str]) -> dict[str, list[str]]:
        """Clients that learn from each other."""
        groups: dict[str, list[str]] = {}
        for client_id in client_ids:
            groups.setdefault(self._group(types[client_id]), []).append(client_id)
        return groups

    def aggregate(
        self, server_round: int, reports: Sequence[TrainReply], classes: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Average what clients predict on the next round's anchors.

        Returns what happened (for the journal), and reasons by client id for predictions that were refused. Where no
        client's are usable the next round has no targets.
        """
        usable: dict[str, Array] = {}
        refused: dict[str, str] = {}
        for report in sorted(reports, key=lambda report: report.client_id):
            try:
                usable[report.client_id] = as_probabilities(
                    report.predictions, self.asked(server_round), classes
                )
            except ExchangeError as error:
                refused[report.client_id] = str(error)
        self._targets, self._due = {}, server_round + 1
        if not usable:
            return {}, refused
        types = {report.client_id: report.type_key for report in reports}
        shares: dict[str, float] = {}
        means = []
        for group, members in self._groups(list(usable), types).items():
            predictions = [usable[client_id] for client_id in members]
            voices_of = agreement_weights(predictions, self.options.agreement_power)
            mean, weights = confidence_weighted_mean(
                predictions, voices_of, self.options.entropy_power
            )
            self._targets[group] = sinkhorn_balance(mean, self.options.balance).astype(np.float32)
            means.append(mean)
            for client_id, weight in zip(members, weights, strict=True):
                shares[types[client_id]] = shares.get(types[client_id], 0.0) + weight
        entropy = float(entropies(np.stack(means)).mean())
        return {"agreement_weights": shares, "entropy": entropy, "clients": len(usable)}, refused
