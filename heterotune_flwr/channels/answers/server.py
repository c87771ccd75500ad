"""Answers on open text: what clients of different models answer to public anchors, in words.

Label probabilities need a closed label set; words every model can read. Each client *samples* an answer to every
anchor, and of all answers to an anchor one is drawn, by the clients' voices, for all to learn in the next round. A
drawn sample is a target whose expectation is the mean of the clients' distributions, but for their tails and the
balance (sequence-level distillation, arXiv 1606.07947, with samples instead of the most likely answer, which would
teach the crowd's bias). Answers are text that a model trained on private data has written: docs/generation.md says what
keeps private text out of them.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.channel import Aggregated, RunFacts, Update
from heterotune_flwr.channels.predictions.agreement import agreement_weights
from heterotune_flwr.channels.predictions.record import DistillationRequest, Said, as_answers
from heterotune_flwr.channels.text_rounds import TextRounds
from heterotune_flwr.cmga.pull import no_louder
from heterotune_flwr.data.text_metrics import folded, words
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.seeds import generator

Matrix = NDArray[np.float64]

#: Words of answers are counted in so many bins, to compare clients.
_BINS = 256
#: Answers given to at least this share of the anchors, and to two of them by two clients, are made equally frequent.
_FREQUENT = 0.01


def bags(answers: Sequence[str]) -> Matrix:
    """Words of every answer as shares (``n x 256``, rows sum to 1; zero where there is no word), hashed."""
    found: Matrix = np.zeros((len(answers), _BINS))
    for row, answer in zip(found, answers, strict=True):
        for word in words(answer):
            row[zlib.crc32(word.encode()) % _BINS] += 1.0
    found /= np.maximum(found.sum(axis=1, keepdims=True), 1.0)
    return found


def balance_answers(weights: Matrix, answers: Sequence[Sequence[str]], iterations: int) -> Matrix:
    """Make frequent answers equally frequent, as :func:`..predictions.server.sinkhorn_balance` does with labels.

    ``weights`` (clients x n) sum to 1 on every anchor that somebody answered. Answers whose weights add up to less than
    a hundredth of the anchors stay as they are, so free text, where every answer is another, is left alone; so do those
    that one client alone gives, who would be lifted above its voice by whatever it invents.
    """
    names: dict[str, int] = {}
    index = np.array(
        [
            [names.setdefault(" ".join(folded(a).split()), len(names)) for a in own]
            for own in answers
        ]
    )
    least = max(2.0, _FREQUENT * weights.shape[1])
    speakers = np.zeros(len(names))
    for own in index:
        speakers[np.unique(own)] += 1
    known = speakers >= min(2, len(answers))
    for _ in range(iterations):
        mass = np.bincount(index.ravel(), weights.ravel(), minlength=len(names))
        frequent = known & (mass >= least)
        if not frequent.any():
            return weights
        factors = np.where(frequent, mass[frequent].mean() / np.maximum(mass, 1e-12), 1.0)
        weights = _shares(weights * factors[index])
    return weights


def _shares(weights: Matrix) -> Matrix:
    return np.asarray(weights / np.maximum(weights.sum(axis=0), 1e-300))


class AnswerEnsemble(TextRounds[list[str]]):
    """The server's half where answers are words.

    Its options mean here what they mean with predictions: agreement is that of the answers' words, sureness is
    ``exp(-mean entropy of the answer's tokens)``, and what is made equally frequent are answers that many anchors get.
    """

    def open(self, run: RunFacts) -> str | None:
        """A closed label set exchanges probabilities; guests learn from the answers to the pool, word by word."""
        if run.labels:
            return "the task has a closed label set, on which models exchange probabilities"
        self.options = dataclasses.replace(self.options, guest_anchors=self.options.pool)
        return super().open(run)

    def bring(
        self, request: DistillationRequest, known: list[str], places: list[int]
    ) -> DistillationRequest:
        """Answers to fit."""
        return dataclasses.replace(request, answers=[known[place] for place in places])

    def state_dict(self) -> State:
        """The next round's answers."""
        texts = {key: json.dumps(answers).encode() for key, answers in self.known.items()}
        arrays = {key: np.frombuffer(text, dtype=np.uint8) for key, text in texts.items()}
        return {"answers": arrays, "due": self.due}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self.known = {key: json.loads(a.tobytes()) for key, a in state["answers"].items()}
        self.due = state["due"]

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Draw, for every anchor of the next round, one of the answers that clients gave."""
        usable: dict[str, tuple[list[str], Matrix]] = {}
        refused: dict[str, str] = {}
        for client_id, payload in replies.items():
            try:
                usable[client_id] = _checked(payload, self.asked(server_round))
            except ExchangeError as error:
                refused[client_id] = str(error)
        self.known, self.due = {}, server_round + 1
        shares: dict[str, float] = {}
        for group, members in self.groups(list(usable)).items():
            said = [usable[client_id] for client_id in members]
            weights = self._weigh(said)
            rng = generator(self.run.seed, f"answers.{server_round}.{group}")
            self.known[group] = _draw(weights, [answers for answers, _ in said], rng)
            shares |= {cid: float(w) for cid, w in zip(members, weights.mean(axis=1), strict=True)}
        if not usable:
            return Aggregated({}, refused)
        log = {
            "agreement_weights": self.shares_by_type(shares),
            "sureness": float(np.stack([sure for _, sure in usable.values()]).mean()),
            "clients": len(usable),
            "answers": len({answer for answers in self.known.values() for answer in answers}),
        }
        return Aggregated(log, refused)

    def _weigh(self, said: Sequence[tuple[list[str], Matrix]]) -> Matrix:
        """Chance of every client's answer to be drawn (clients x n); 0 where it said nothing."""
        options = self.options
        # Bins in which nobody has a word tell nothing, and centred words of agreeing clients correlate as labels do.
        loud = agreement_weights(
            [bags(answers).astype(np.float32) for answers, _ in said], options.agreement_power
        )
        spoken = np.array([[bool(answer) for answer in answers] for answers, _ in said], float)
        sure = np.stack([sureness for _, sureness in said])
        sure = no_louder(sure) ** options.entropy_power
        weights = _shares(np.asarray(loud)[:, None] * sure * spoken)
        return balance_answers(weights, [answers for answers, _ in said], options.balance)


def _checked(payload: Payload | None, count: int) -> tuple[list[str], Matrix]:
    """A client's answers without white space around them, and how sure it is of each (``n``, above 0 to 1)."""
    said = None if payload is None else Said.from_payload(payload)
    answers = [answer.strip() for answer in as_answers(said.answers if said else None, count)]
    sure = said.predictions if said else None
    if sure is None or sure.shape != (count, 1):
        shape = "nothing" if sure is None else list(sure.shape)
        raise ExchangeError(f"how sure it is of its answers is {shape}, expected {count} x 1")
    if not np.isfinite(sure).all() or sure.min() < 0 or sure.max() > 1:
        raise ExchangeError("how sure it is of its answers is no share of 1")
    return answers, np.maximum(sure[:, 0].astype(np.float64), 1e-3)


def _draw(weights: Matrix, answers: Sequence[Sequence[str]], rng: np.random.Generator) -> list[str]:
    """One of the clients' answers to every anchor, "" where nobody gave one."""
    drawn = []
    for anchor in range(weights.shape[1]):
        limit = rng.random()
        reached = np.cumsum(weights[:, anchor])
        if reached[-1] <= 0:
            drawn.append("")
            continue
        drawn.append(
            answers[int(np.searchsorted(reached, limit * reached[-1], side="right"))][anchor]
        )
    return drawn


Channel = AnswerEnsemble
