"""Predictions on open text: distributions over symbols at the positions of public answers, averaged (numpy only).

One answer is written to each public prompt, by the bare model of a drawn client or by its trained one. From then on all
clients predict at its positions in every round, and fit the mean of the last two (two live teachers can collapse into
each other). A type whose loss on held-out examples that raises stops fitting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.alignment.public_texts import entropies
from heterotune_flwr.channels.channel import (
    Aggregated,
    Note,
    Purposes,
    RunFacts,
    Unlabelled,
    Update,
)
from heterotune_flwr.channels.predictions.agreement import agreement_weights
from heterotune_flwr.channels.predictions.rounds import Rounds
from heterotune_flwr.channels.predictions.token_mean import binned, in_common, mean_of, moving
from heterotune_flwr.channels.predictions.token_record import (
    NOTHING,
    TokenReply,
    TokenRequest,
    TopSymbols,
)
from heterotune_flwr.data.symbols import RunSymbols
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import as_numbers
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.protocol.payloads import Payload

#: A type stops fitting where its loss on held-out examples is so many times that of the same round without, as its
#: clients measure it in the first rounds in which they fit.
HARM, _JUDGED = 1.02, 2
#: Rounds in which prompts without an answer are asked again.
_WRITING = 3


class TokenRounds(Rounds):
    """The server's half for open text."""

    rounds_before = 1

    def open(self, run: RunFacts) -> str | None:
        """As :meth:`.Rounds.open`; predictions are of the symbols that all vocabularies have."""
        if not run.symbols.count:
            return (
                "nobody knows what the vocabularies have in common: set alignment.output=vocabulary"
            )
        super().open(run)
        self.table = table_digest(run.symbols) if run.symbols.packed else ""
        learners = [cid for cid, info in run.clients.items() if info.train_examples]
        self._turns = {client_id: turn for turn, client_id in enumerate(sorted(learners))}
        #: Answers to the prompts, "" where there is none yet, and rounds in which they were asked.
        self.answers, self.rounds = [""] * self.options.anchors, 0
        #: Targets by type; under "" where all learn from the same.
        self.known: dict[str, TopSymbols] = {}
        #: Clients that hold the table of symbols.
        self.holders: set[str] = set()
        #: Type -> rounds in which its clients measured what fitting does to them, and types that have stopped.
        self.judged: dict[str, int] = {}
        self.off: list[str] = []
        return None

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """Clients predict in every round, and fit where something is known."""
        return ["predict", "fit"] if self._fits(type_key) else ["predict"]

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """What a client is asked and brought in a training; a guest predicts nothing."""
        guest = "unlabelled" in purposes
        if not guest and "train" not in purposes:
            return None
        return self._asked(client_id, guest).to_payload()

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """As many steps as the options say, where there is something to learn."""
        if not self._fits(type_key):
            return None
        return Unlabelled(self.options.guest_steps, self.options.anchors)

    def _asked(self, client_id: str, guest: bool = False) -> TokenRequest:
        options, symbols = self.options, self.run.symbols
        type_key = self.run.clients[client_id].type_key
        writes = not guest and self.rounds < _WRITING and client_id in self._turns
        of = min(len(self._turns), options.anchors) if writes and "" in self.answers else 0
        targets = self._known_to(type_key) if self._fits(type_key) else NOTHING
        return TokenRequest(
            digest=self.digests[options.pool], pool=options.pool, count=options.anchors, weight=options.weight,
            batch=options.batch, symbols=symbols.count, table=self.table, answers=self.answers,
            turn=self._turns.get(client_id, 0) % of if of else 0, of=of,
            by_client=options.answers_by == "client", asked=not guest and any(self.answers),
            judged=not guest and len(targets) > 0 and self.judged.get(type_key, 0) < _JUDGED, targets=targets,
            packed=b"" if client_id in self.holders else symbols.packed,
        )  # fmt: skip

    def _known_to(self, type_key: str) -> TopSymbols:
        return self.known.get(self.group(type_key), NOTHING)

    def _fits(self, type_key: str) -> bool:
        """Whether there is something for a type to fit."""
        return len(self._known_to(type_key)) > 0 and type_key not in self.off

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Take in answers, predictions and losses of a round."""
        usable: dict[str, TokenReply] = {}
        refused: dict[str, str] = {}
        asked = {client_id: self._asked(client_id) for client_id in replies}
        for client_id, payload in replies.items():
            try:
                usable[client_id] = _read(payload, asked[client_id])
            except ExchangeError as error:
                refused[client_id] = str(error)
        self.holders |= {client_id for client_id, reply in usable.items() if not reply.lacks}
        self.holders -= {client_id for client_id, reply in usable.items() if reply.lacks}
        notes = self._judge(usable)
        log = self._average(usable)
        self._write(usable, asked)
        written = sum(map(bool, self.answers))
        log |= {"clients": len(usable), "answers": written, "off": list(self.off)}
        return Aggregated(log, refused, notes)

    def _write(self, usable: Mapping[str, TokenReply], asked: Mapping[str, TokenRequest]) -> None:
        if "" in self.answers and self.rounds < _WRITING:
            self.rounds += 1
        answers = list(self.answers)
        for client_id, reply in usable.items():
            for number, answer in zip(asked[client_id].unwritten, reply.written, strict=False):
                answers[number] = (
                    " ".join(answer.split()) if not answers[number] else answers[number]
                )
        self.answers = answers

    def _average(self, usable: Mapping[str, TokenReply]) -> dict[str, Any]:
        shares: dict[str, float] = {}
        sureness, positions, told = [], 0, 0
        for group, members in self.groups([cid for cid in usable if len(usable[cid].said)]).items():
            said = {client_id: usable[client_id].said for client_id in members}
            types: dict[str, list[TopSymbols]] = {}
            for client_id, one in said.items():
                types.setdefault(self.run.clients[client_id].type_key, []).append(one)
            keys = in_common(types)
            told += len(np.unique(np.concatenate([one.keys for one in said.values()])))
            positions += len(keys)
            loud = agreement_weights(
                [binned(one, keys) for one in said.values()], self.options.agreement_power
            )
            mean, heard = mean_of(list(said.values()), loud, self.options.entropy_power, keys)
            self.known[group] = moving(self.known.get(group, NOTHING), mean)
            shares |= dict(zip(said, heard, strict=True))
            sureness.append(float(entropies(mean.chances).mean()) if len(mean) else 0.0)
        if not shares:
            return {}
        return {
            "agreement_weights": self.shares_by_type(shares),
            "entropy": float(np.mean(sureness)),
            "positions": positions,
            "one_to_one": positions / max(told, 1),
        }

    def _judge(self, usable: Mapping[str, TokenReply]) -> list[Note]:
        """Stop the fit of types whose held-out loss it raises by more than :data:`HARM` says."""
        ratios: dict[str, list[float]] = {}
        for client_id, reply in usable.items():
            if reply.held_out is not None and reply.without is not None:
                own = ratios.setdefault(self.run.clients[client_id].type_key, [])
                own.append(reply.held_out / max(reply.without, 1e-9))
        notes = []
        for key, own in sorted(ratios.items()):
            ratio, self.judged[key] = float(np.median(own)), self.judged.get(key, 0) + 1
            if key not in self.off and ratio > HARM:
                self.off.append(key)
                rise = 100 * (ratio - 1)
                notes.append(
                    Note(
                        f"{key} stops learning from predictions: they raise its held-out loss by {rise:.1f} %",
                        {"type": key, "ratio": ratio},
                    )
                )
        return notes

    def state_dict(self) -> State:
        """All that changes from round to round."""
        fields = {
            "answers": self.answers, "holders": sorted(self.holders), "judged": self.judged, "off": self.off,
            "rounds": self.rounds,
        }  # fmt: skip
        known = {key: vars(said) for key, said in self.known.items()}
        text = np.frombuffer(json.dumps(fields).encode(), np.uint8)
        return {"fields": text, "known": known}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        fields = json.loads(state["fields"].tobytes())
        self.answers, self.holders = fields["answers"], set(fields["holders"])
        self.judged, self.off, self.rounds = fields["judged"], fields["off"], fields["rounds"]
        self.known = {key: TopSymbols(**said) for key, said in state["known"].items()}


def _read(payload: Payload | None, request: TokenRequest) -> TokenReply:
    if payload is None:
        raise ExchangeError("it says nothing of public answers")
    return TokenReply.from_payload(payload, request)


def table_digest(symbols: RunSymbols) -> str:
    """Identity of a table of symbols as clients keep it (hex)."""
    return tensor_digest({"symbols": as_numbers(symbols.packed)})
