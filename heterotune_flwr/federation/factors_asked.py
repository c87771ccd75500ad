"""The public factors of model types: asked of two clients each, and believed where the two agree.

Factors are a client's own word, and all types' maps are made from them; what is kept in the server's cache serves later
runs too, under a fingerprint that the client claims. So one client alone is believed only in this machine's own
simulation, where every client is the same program (a second one would double the work before a first run: of the
embedded family 1.5 minutes of one core). Elsewhere two are asked at once, a third where they disagree, and so on up to
:data:`MOST_ASKED`; the first pair that agrees (:func:`..alignment.factor_checks.same_backbone`) is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from heterotune_flwr.alignment.align import Trust
from heterotune_flwr.alignment.factor_checks import same_backbone
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.exchange.packing import Tensors, content_bytes
from heterotune_flwr.federation.messenger import make_message, send_and_collect
from heterotune_flwr.federation.roster import AGAIN_SECONDS, Roster
from heterotune_flwr.flower import Grid, RecordDict
from heterotune_flwr.protocol.messages import ALIGN
from heterotune_flwr.protocol.queries import AlignReply

#: Clients of a type whose factors are compared at most.
MOST_ASKED = 5


@dataclass
class TypeAnswers:
    """What the clients of one type have answered so far."""

    waiting: list[str]
    wanted: int
    told: list[tuple[str, Tensors]] = field(default_factory=list)
    passing: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    chosen: Tensors | None = None

    def next(self) -> list[str]:
        """Whom to ask now; nobody where enough is known, or nobody is left."""
        if self.chosen is not None or len(self.told) >= MOST_ASKED:
            return []
        count = max(self.wanted - len(self.told), 1)
        asked, self.waiting = self.waiting[:count], self.waiting[count:]
        return asked

    def aggregate(self, client_id: str, factors: Tensors) -> None:
        """Take what one has told; with enough that agrees, it is chosen."""
        if self.wanted == 1:
            self.chosen = factors
        for _, other in self.told:
            if self.chosen is None and same_backbone(other, factors):
                self.chosen = other
        self.told.append((client_id, factors))


@dataclass(kw_only=True)
class Asked:
    """What asking clients of a roster has come to.

    Attributes
    ----------
    down, up
        What it has cost, by client id [bytes].
    trust
        Whom to believe.

    """

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    trust: Trust = field(default_factory=Trust)

    def pay(self, client_id: str, down: int, up: int) -> None:
        """Add what one question has cost."""
        self.down[client_id] = self.down.get(client_id, 0) + down
        self.up[client_id] = self.up.get(client_id, 0) + up


@dataclass(frozen=True)
class Question:
    """What is asked of whom.

    Attributes
    ----------
    content
        The message.
    fault
        Says of (client id, its factors) what is wrong with them, empty where nothing is.
    pay
        Called with (client id, bytes down, bytes up) of every answer.
    seconds, patience
        How long an answer, and one that is away, is waited for.
    wanted
        Clients of a type that must agree.
    on_progress
        Called with how many clients have answered or were given up, and how many were asked.

    """

    content: RecordDict
    fault: Callable[[str, Tensors], str]
    pay: Callable[[str, int, int], None]
    seconds: float
    patience: float
    wanted: int
    on_progress: Callable[[int, int], None] | None = None


def ask_types(
    grid: Grid, roster: Roster, type_keys: Iterable[str], question: Question, trust: Trust
) -> tuple[dict[str, Tensors], dict[str, TypeAnswers]]:
    """Get one part of the factors of some types; what they are worth goes into ``trust``.

    Where all of a type failed, those whose process died or whose node was away are asked again while the patience
    lasts: they may be restarting.
    """
    types = {key: TypeAnswers(roster.of_type(key), question.wanted) for key in type_keys}
    deadline = time.monotonic() + question.patience
    while True:
        asked = {
            roster.clients[cid].node_id: key for key, one in types.items() for cid in one.next()
        }
        if asked:
            _ask_once(grid, roster, asked, types, question)
            continue
        again = [one for one in types.values() if not one.told and one.passing]
        if not again or time.monotonic() + AGAIN_SECONDS > deadline:
            break
        time.sleep(AGAIN_SECONDS)
        for one in again:
            one.waiting, one.passing = one.passing, []
    factors: dict[str, Tensors] = {}
    for key, one in types.items():
        if not one.told:
            trust.lost[key] = f"no client of {key} could be aligned; {'; '.join(one.reasons[:1])}"
            continue
        if one.chosen is None:
            (trust.unchecked if len(one.told) == 1 else trust.apart).add(key)
        factors[key] = one.chosen or one.told[0][1]
    return factors, types


def _ask_once(
    grid: Grid,
    roster: Roster,
    asked: dict[int, str],
    types: dict[str, TypeAnswers],
    question: Question,
) -> None:
    by_node = roster.node_to_client()
    messages = [make_message(question.content, node, ALIGN, 0, question.seconds) for node in asked]
    replies = send_and_collect(grid, messages, question.seconds, on_progress=question.on_progress)
    problems = dict(replies.failures)
    told: dict[int, Tensors] = {}
    for message in replies.messages:
        node = message.metadata.src_node_id
        client_id = by_node[node]
        try:
            factors = AlignReply.from_content(message.content).factors
        except HeteroTuneError as error:
            problems[node] = str(error)
            continue
        question.pay(client_id, content_bytes(question.content), content_bytes(message.content))
        if fault := question.fault(client_id, factors):
            problems[node] = f"its factors cannot be used: {fault}"
        else:
            told[node] = factors
    for node, reason in sorted(problems.items()):
        types[asked[node]].reasons.append(f"{by_node[node]}: {reason}")
    for node in replies.passing:
        types[asked[node]].passing.append(by_node[node])
    for node in sorted(told, key=lambda node: by_node[node]):  # whoever answers first
        types[asked[node]].aggregate(by_node[node], told[node])
