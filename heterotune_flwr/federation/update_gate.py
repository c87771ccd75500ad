"""The update gate: what a reply must be before a strategy sees it. In front of every strategy, ours or a user's.

Checks, in this order; the first that fails names the refusal (docs/reliability.md says what they cannot see):

==============  =================================================================================================
``unreadable``  every record and field can be read: dtype, sizes, manifest, codec
``sender``      it speaks for the client it comes from
``round``       it answers this round
``code``        it ran the program the client described itself with
``type``        it was trained on the client's own backbone
``maps``        it was trained behind the frozen maps that were asked for
``work``        examples, steps and learning rate are those asked, at most as many as declared; metrics are finite
``tensors``     exactly the expected names and shapes, every number finite
``duplicate``   it is the client's first answer, and not its last applied update once more
``size``        not far longer than the local optimizer can go, the round's updates, and the type's past ones
==============  =================================================================================================

**Size.** AdamW moves every number by about the learning rate a step whatever the gradient's scale, so the root mean
square of an update over the sum of its steps' rates is at most about 1 and nearly the same in models of any size. Plain
SGD, whose gradients are clipped, goes no further than that sum times ``clip_norm`` in Euclidean norm. An
update's *reach* is its length in these units. Refused is a reach above the ceiling, or above ``limit`` times the usual
one: the round's median, each type being measured from its own level in past rounds. Few updates of a kind seen for the
first time have no usual reach: for them the ceiling alone acts. Below the limit, an update is shortened to what one
client may pull (:meth:`UpdateGate.shorten`, :mod:`..cmga.pull`).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from heterotune_flwr.cmga.pull import longest
from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.federation.updates import (
    ClientUpdate,
    Shapes,
    Work,
    as_update,
    check_update,
    fingerprint_of,
    norm_of,
    numbers_of,
)
from heterotune_flwr.flower import RecordDict
from heterotune_flwr.protocol.messages import TrainReply

#: Share of the old level that is kept when a type's level moves.
_DECAY = 0.7
#: Fewer updates than this have no median that means anything.
_COMPARABLE = 3
#: A skewed client's SGD steps can be several times longer than the others': below reach 1 it gets this much more.
_SGD_SLACK = 2.0
#: More metrics than this no client reports.
MOST_METRICS = 64
T = TypeVar("T")


class RefusedError(FederationError):
    """An update that is not used; ``check`` is one of the gate's checks."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check


@dataclass(frozen=True)
class Asked:
    """What a client was asked for, and what it said of itself beforehand.

    ``expected`` bounds what is decoded at all: shapes and codecs; so does ``channels``, names of those at work.
    """

    client_id: str
    type_key: str
    round: int
    code_hash: str
    maps_digest: str
    shapes: Shapes
    work: Work
    expected: Expected | None = None
    channels: Collection[str] = ()


@dataclass(frozen=True)
class Candidate:
    """A reply that passed every check but the one that needs the others."""

    reply: TrainReply
    update: ClientUpdate
    asked: Asked


def normalized_norm(update: ClientUpdate, work: Work) -> float:
    """Length of an update in units of what its optimizer can do; 0 for no or only zero tensors."""
    count = numbers_of(update.deltas)
    if not count:
        return 0.0
    length = norm_of(update.deltas) / update.path_length
    return length / work.clip_norm if work.optimizer == "sgd" else length / math.sqrt(count)


@dataclass
class UpdateGate:
    """Checks replies; remembers each type's usual reach, each client's last applied update, and refusals.

    Attributes
    ----------
    limit
        ``server.norm_limit``; None: norms are not compared.
    ceiling
        ``server.norm_ceiling``; None: there is none.
    counts
        Client id -> check -> how many of its updates were refused there.

    """

    limit: float | None = 5.0
    ceiling: float | None = 3.0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    _levels: dict[str, float] = field(default_factory=dict)
    _last: dict[str, list[Any]] = field(default_factory=dict)

    def read(self, content: RecordDict, asked: Asked) -> Candidate:
        """Read one reply and check it by itself.

        Raises
        ------
        RefusedError
            With the check that failed, and one line that says how.

        """
        reply = _stage(
            "unreadable",
            lambda: TrainReply.from_content(content, asked.expected, asked.channels),
        )
        for check, got, expected, line in (
            ("sender", reply.client_id, asked.client_id, "answers as {}"),
            ("round", reply.round, asked.round, "answers round {} instead of {}"),
            ("code", reply.code_hash, asked.code_hash, "ran version {} of this program, not {}"),
            ("type", reply.type_key, asked.type_key, "answers as type {} instead of {}"),
            ("maps", reply.maps_digest, asked.maps_digest, "trained behind the maps {}, not {}"),
        ):
            if got != expected:
                raise RefusedError(
                    check, line.format(*("(none)" if v == "" else v for v in (got, expected)))
                )
        update = _stage("work", lambda: as_update(reply, asked.type_key, asked.work))
        _stage("work", lambda: _check_metrics(reply.metrics))
        reply = replace(reply, metrics={**reply.metrics, "examples": update.examples})
        _stage("tensors", lambda: check_update(update, asked.shapes))
        last = self._last.get(asked.client_id)
        if last is not None and last[1] == fingerprint_of(update.deltas):
            raise RefusedError("duplicate", f"sends its update of round {last[0]} again")
        return Candidate(reply, update, asked)

    def compare(self, candidates: Mapping[str, Candidate]) -> dict[str, str]:
        """Client id -> reason, for updates that are too long; nothing is remembered."""
        norms = {cid: normalized_norm(c.update, c.asked.work) for cid, c in candidates.items()}
        refused = {}
        usual = self._usual(candidates, norms)
        for client_id, value in norms.items():
            slack = _slack(candidates[client_id], value)
            if self.ceiling is not None and value > self.ceiling:
                refused[client_id] = (
                    f"sends an update {value:.3g} times longer than its steps can make"
                )
            elif self.limit and value > slack * self.limit * usual.get(client_id, math.inf):
                times = value / usual[client_id]
                refused[client_id] = f"sends an update {times:.3g} times longer than the usual ones"
        return refused

    def shorten(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Client id -> share of its update that is used, where it is longer than one client's may be.

        What counts in a mean is examples times length: :data:`..cmga.pull.MOST` times the usual, so that who has
        twice as many examples as the median client cannot be longer too.
        """
        norms = {cid: normalized_norm(c.update, c.asked.work) for cid, c in candidates.items()}
        usual = self._usual(candidates, norms)
        shares = {}
        for client_id, length in usual.items():
            candidate, value = candidates[client_id], norms[client_id]
            times = longest(candidate.update.examples, candidate.asked.work.most)
            allowed = _slack(candidate, value) * times * length
            if value > allowed:
                shares[client_id] = allowed / value
        return shares

    def _usual(
        self, candidates: Mapping[str, Candidate], norms: Mapping[str, float]
    ) -> dict[str, float]:
        """The reach each update is measured against; absent where there is nothing to measure by."""
        moving = {cid: math.log(value) for cid, value in norms.items() if value > 0}
        if not moving or self.limit is None:
            return {}
        keys = {cid: _kind(candidates[cid].update) for cid in moving}
        known = [self._levels[key] for key in set(keys.values()) if key in self._levels]
        neutral = statistics.median(known) if known else 0.0
        base = {cid: self._levels.get(keys[cid], neutral) for cid in moving}
        surplus = {cid: moving[cid] - base[cid] for cid in moving}
        drift = None
        if (
            len(moving) >= _COMPARABLE
        ):  # of an even number the lower one: long updates are the suspects
            drift = statistics.median_low(surplus.values())
        # All types may drift together from round to round, but a majority of a small round cannot excuse itself.
        most = math.log(self.limit) / 2
        usual = {}
        for client_id in moving:
            if keys[client_id] in self._levels:
                allowed = 0.0 if drift is None else min(max(drift, -most), most)
                usual[client_id] = math.exp(base[client_id] + allowed)
            elif drift is not None:
                usual[client_id] = math.exp(base[client_id] + drift)
        return usual

    def learn(self, candidates: Mapping[str, Candidate]) -> None:
        """Remember the updates of a round that was applied: levels per type, and each client's last update."""
        by_kind: dict[str, list[float]] = {}
        for client_id in sorted(candidates):
            candidate = candidates[client_id]
            value = normalized_norm(candidate.update, candidate.asked.work)
            if value > 0:
                by_kind.setdefault(_kind(candidate.update), []).append(math.log(value))
                digest = fingerprint_of(candidate.update.deltas)
                self._last[client_id] = [candidate.asked.round, digest]
        for kind, values in sorted(by_kind.items()):
            now = statistics.median_low(values)
            self._levels[kind] = _DECAY * self._levels.get(kind, now) + (1 - _DECAY) * now

    def count(self, client_id: str, check: str) -> None:
        """Count a refusal."""
        counts = self.counts.setdefault(client_id, {})
        counts[check] = counts.get(check, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers; JSON-able."""
        return {
            "levels": dict(self._levels),
            "last": {cid: list(entry) for cid, entry in self._last.items()},
            "counts": {cid: dict(counts) for cid, counts in self.counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave: from here on it judges exactly as the one that was saved."""
        self._levels = {key: float(value) for key, value in state["levels"].items()}
        self._last = {cid: list(entry) for cid, entry in state["last"].items()}
        self.counts = {cid: dict(counts) for cid, counts in state["counts"].items()}


def _slack(candidate: Candidate, value: float) -> float:
    """What an honest update may be longer than others for its optimizer's sake."""
    return _SGD_SLACK if candidate.asked.work.optimizer == "sgd" and value <= 1 else 1.0


def _stage(check: str, step: Callable[[], T]) -> T:
    """Run one check; what it complains about is refused in its name."""
    try:
        return step()
    except HeteroTuneError as error:
        raise RefusedError(check, str(error)) from error


def _check_metrics(metrics: Mapping[str, float]) -> None:
    if len(metrics) > MOST_METRICS:
        raise FederationError(f"reports {len(metrics)} metrics, more than {MOST_METRICS}")
    for name in sorted(metrics):
        if not math.isfinite(metrics[name]):
            raise FederationError(f"reports {name} = {metrics[name]}")


def _kind(update: ClientUpdate) -> str:
    """Whose updates are alike: those of one type that train the same tensors."""
    names = "\n".join(sorted(update.deltas))
    return f"{update.type_key} {hashlib.sha256(names.encode()).hexdigest()[:12]}"
