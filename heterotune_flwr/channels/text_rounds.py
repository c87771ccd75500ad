"""Rounds about public texts: which texts, what is brought and asked, and what guests learn (numpy only).

What clients predict on the texts of a round is what all of them fit in the next.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors, round_anchors
from heterotune_flwr.channels.channel import (
    POOL_OVER,
    Purpose,
    Purposes,
    RunFacts,
    ServerChannel,
    Unlabelled,
)
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.config.options import read_options
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import option
from heterotune_flwr.protocol.payloads import Payload

#: What is known of a list of texts: a row for each.
Known = TypeVar("Known", bound=Sized)


@dataclass(frozen=True)
class TextOptions:
    """Options of a strategy's ``predictions``: what clients say of public texts, and all learn."""

    anchors: int = option(
        256,
        "public texts a round is about, C bytes each way per client-round; on open text: prompts [texts]",
        least=1,
    )
    pool: int = option(
        1024,
        "they are drawn from so many, the first of alignment.anchors; clients keep their frozen states [texts]",
        least=1,
    )
    weight: float = option(1.0, "of their loss beside the loss on own examples [factor]", least=0)
    agreement_power: float = option(
        1.0,
        "a client's share is its agreement with the others to this power: its predictions' correlation with the mean "
        "of the other clients'; 0: all have the same [power]",
        least=0,
        most=50,
    )
    entropy_power: float = option(
        1.0,
        "on each text a client's share is multiplied by exp(-entropy_power x entropy of what it predicts there): who "
        "knows speaks. 0: no difference; at 1 the surest counts at most C times as much as one without an idea [power]",
        least=0,
        most=50,
    )
    balance: int = option(
        5,
        "rounds of Sinkhorn's algorithm that make labels equally frequent; 0: none [rounds]",
        least=0,
    )
    batch: int = option(
        0,
        "public texts in every training step; 0: as many as examples (train.batch_size) [texts]",
        least=0,
    )
    pool_over: str = option(
        "all",
        "over whom is pooled for a client: all, or its own type, where nothing crosses types",
        choices=POOL_OVER,
    )
    guest_anchors: int = option(
        0,
        "where there are guests: texts everybody predicts on in the last round, for them to learn from; 0: as many as "
        "pool [texts]",
        least=0,
    )
    guest_steps: int = option(
        480, "on these texts, that guests take after the last round [steps]", least=1
    )

    answers_by: str = option(
        "bare",
        "who writes, on open text, the answers to public prompts at whose positions all predict: a bare model, or a "
        "client's trained one, where its owner allows it",
        choices=("bare", "client"),
    )

    def __post_init__(self) -> None:
        if self.anchors > self.pool:
            raise ConfigError(f"anchors is {self.anchors}, more than the {self.pool} of pool")


class TextRounds(ServerChannel, Generic[Known]):
    """The server's half of a channel whose clients say something of public texts, and fit what came of it."""

    options: TextOptions
    teaches = pools = True

    @classmethod
    def read(cls, given: Any) -> TextOptions:
        """See :class:`TextOptions`."""
        return read_options(TextOptions, given, cls.name)

    def open(self, run: RunFacts) -> str | None:
        """Read the public texts; where there are fewer than the options say, all are used (DataError: none)."""
        options = self.options
        most = max(options.pool, options.guest_anchors)
        texts = load_anchors(dataclasses.replace(run.config.alignment, count=most))
        pool = min(options.pool, len(texts))
        self.options = dataclasses.replace(
            options, pool=pool, anchors=min(options.anchors, pool), guest_anchors=len(texts)
        )
        self.run = run
        #: Identity of the pool, and of all anchors that guests learn from.
        self.digests = {pool: anchor_digest(texts[:pool]), len(texts): anchor_digest(texts)}
        #: By type; under "" where all learn from the same.
        self.known: dict[str, Known] = {}
        self.due = 0
        return None

    def asked(self, server_round: int) -> int:
        """Anchors that clients predict on in a round: more in the last one, where guests learn from them."""
        last = self.run.guests and server_round == self.run.rounds
        return self.options.guest_anchors if last else self.options.anchors

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """Clients predict in every round, and fit where something is known of it."""
        found: list[Purpose] = ["predict"]
        if not self.round_request(server_round, type_key).is_empty:
            found.append("fit")
        return found

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """What clients are asked in a training; guests are brought all that was predicted for them."""
        type_key = self.run.clients[client_id].type_key
        if "unlabelled" in purposes:
            return self.guest_request(server_round, type_key).to_payload()
        if "train" in purposes:
            return self.round_request(server_round, type_key).to_payload()
        return None

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """As many steps as the options say, where there is something to learn."""
        request = self.guest_request(server_round, type_key)
        return None if request.is_empty else Unlabelled(self.options.guest_steps, request.count)

    def round_request(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a client is asked in a round; without targets where nobody it learns from has predicted them."""
        options, known = self.options, self._known_to(server_round, type_key)
        request = self._about(options.pool, options.anchors, self.asked(server_round))
        if known is None:
            return request
        places = list(range(len(known)))
        if len(known) > options.anchors:  # a run that goes on has it of more, for its guests
            places = round_anchors(options.pool, options.anchors, self.run.seed, server_round)
        return self.bring(request, known, places)

    def guest_request(self, server_round: int, type_key: str) -> DistillationRequest:
        """What a guest fits after the last round, the one before ``server_round``: all that was predicted for it.

        Nothing, where nobody knew that it was the last round, and predictions are of an ordinary one's anchors.
        """
        known = self._known_to(server_round, type_key)
        if known is None or len(known) not in self.digests:
            return self._about(1, 1, asked=0)
        count = len(known)
        return self.bring(self._about(count, count, asked=0), known, list(range(count)))

    @abstractmethod
    def bring(
        self, request: DistillationRequest, known: Known, places: list[int]
    ) -> DistillationRequest:
        """Put what is known of some places into a request."""

    def _known_to(self, server_round: int, type_key: str) -> Known | None:
        return self.known.get(self.group(type_key)) if self.due == server_round else None

    def _about(self, pool: int, count: int, asked: int) -> DistillationRequest:
        """A request as the options say; one about a list that is none of ours has no digest."""
        options = self.options
        return DistillationRequest(
            self.digests.get(max(pool, asked), ""), pool, count, options.weight, None, options.batch,
            asked,
        )  # fmt: skip

    def group(self, type_key: str) -> str:
        """Name of those who learn from each other."""
        return type_key if self.options.pool_over == "type" else ""

    def groups(self, client_ids: Sequence[str]) -> dict[str, list[str]]:
        """Clients that learn from each other."""
        found: dict[str, list[str]] = {}
        for client_id in client_ids:
            found.setdefault(self.group(self.run.clients[client_id].type_key), []).append(client_id)
        return found

    def shares_by_type(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Sum of clients' shares, by type."""
        found: dict[str, float] = {}
        for client_id, share in shares.items():
            key = self.run.clients[client_id].type_key
            found[key] = found.get(key, 0.0) + share
        return found
