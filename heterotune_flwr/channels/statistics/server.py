"""Class statistics: what every type's labelled examples say, in the space all types share, in closed form.

A client tells once how many examples it has of each class and the sum of their latents (of the bare backbone, behind
its type's maps). Sums of different models add up, since the alignment gives the same text the same latents. So the
server knows, without any training, what training on everybody's examples together would find (:mod:`.class_pool` bounds
what one client's sums count for)::

    m_c = (s_c + k m) / (n_c + k)                          means, drawn towards the mean m of all classes by k examples
    g_c(z) = m_c' M z - m_c' M m_c / 2,   M = diag(rho / spread^2)

with ``n_c, s_c`` summed over clients, ``spread`` each latent's standard deviation over the public anchors and ``rho``
its held-out canonical correlation, but for one factor per view: maps scale latents by ``rho^alignment.weighting`` with
mean square one, and ``rho`` is read off that scale. It is a linear discriminant
(Fisher 1936, https://doi.org/10.1111/j.1469-1809.1936.tb02137.x) whose covariance is that of the public anchors
(diagonal: the latents are uncorrelated there), in which a latent counts by how alike the models see it. Clients add
``weight`` times these logits to their model's in what they predict of anchors and in tests, and ``distill_share`` of
that in what they fit to the others' predictions; not on their own examples, where a model would learn them away.

Types whose labels mean something else (wrong, shuffled, another task's) would pull everybody's classes away. So a type
whose classes lie elsewhere than the other types' (:mod:`.agreement`) is left to its own, the one that agrees least
first, until all that are left agree.

Statistics of classes from clients that share *one* frozen model: FedCGS (arXiv 2503.06962), CCVR (arXiv 2106.05001).
That models of different families can pool theirs is what the alignment is for (our definition).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.alignment.views import places_of
from heterotune_flwr.channels.channel import (
    POOL_OVER,
    Aggregated,
    Note,
    Purposes,
    RunFacts,
    ServerChannel,
    Update,
)
from heterotune_flwr.channels.statistics.agreement import who_agrees
from heterotune_flwr.channels.statistics.class_pool import Classes, ClassPool, pooled
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.cmga import pull
from heterotune_flwr.config.options import read_options
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.fields import option
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import MethodConfig

#: A client whose farthest class lies this many times as far away as others' is refused, where so many can be compared
#: and it lies further off than honest ones do (root mean square over latents, in their standard deviations).
_FARTHER, _COMPARABLE, _FAR = 3.0, 3, 3.0
#: A client whose examples count for less than this share of what it told of is put on record.
_DOUBTED = 0.5
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of a strategy's ``statistics``: a classifier pooled from all clients' classes."""

    weight: float = option(
        0.1,
        "of the classifier's logits beside the model's logits; 0: the channel is off [factor]",
        least=0,
    )
    min_count: int = option(
        2,
        "a client tells nothing of classes of which it has fewer: the sum of one is that example's latents [examples]",
        least=1,
    )
    prior: float = option(
        2.0, "k, added to every class at the mean of all classes [examples]", least=0
    )
    pool_over: str = option(
        "all",
        "whose examples a client's is made of: all, or those of its own type, where nothing crosses types",
        choices=POOL_OVER,
    )
    distill_share: float = option(
        0.5,
        "how much of it a client has in its own predictions while it fits the others', in which all of it is. At 0 it "
        "learns what the others' classifier says, and tests add its own again; at 1 it learns the rest [share]",
        least=0,
        most=1,
    )
    min_cosine: float = option(
        0.06,
        "agreement with the other types' classes below which a type has those of its own alone; -1: all are pooled "
        "[cosine]",
        least=-1,
        most=1,
    )


def linear_discriminant(
    counts: Matrix, sums: Matrix, metric: Matrix, prior: float
) -> LinearClassifier:
    """The linear discriminant of pooled classes, its logits zero at the mean of all examples.

    Parameters
    ----------
    counts, sums
        ``C`` and ``C x r``.
    metric
        Diagonal of M, ``r``.
    prior
        k. A class without examples lies at the mean.

    """
    centre = sums.sum(axis=0) / max(float(counts.sum()), 1e-12)
    offsets = (sums - counts[:, None] * centre) / np.maximum(counts + prior, 1e-12)[:, None]
    weight = offsets * metric
    bias = -weight @ centre - 0.5 * (offsets * weight).sum(axis=1)
    return LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))


class PooledClassifier(ServerChannel):
    """The server's half: asks every client once, adds up, hands out."""

    options: StatisticsOptions
    pools = True

    @classmethod
    def read(cls, given: Any) -> StatisticsOptions | None:
        """See :class:`StatisticsOptions`; None where the weight is 0."""
        options = read_options(StatisticsOptions, given, "statistics")
        return options if options.weight > 0 else None

    def reads_views(self, labels: Sequence[str]) -> bool:
        """It reads whole texts besides, wherever it is at work."""
        return bool(labels)

    def most_bytes(self, labels: Sequence[str], method: MethodConfig) -> int | None:
        """A count (4 bytes) and mean latents (2 bytes each) of every label, once or twice a run."""
        read = len(places_of(method)) - method.slots + 1
        return len(labels) * (4 + 2 * read * method.latent)

    def open(self, run: RunFacts) -> str | None:
        """It needs a closed label set, and latents that types share; the last slot's, and those of whole texts."""
        if not run.labels:
            return "the task has no closed label set (data.labels, train.loss)"
        if run.spreads is None:
            return f"method.kind={run.method.kind} has no latents that types share"
        self.clients, self.type_keys = run.clients, run.type_keys
        read = range(run.method.slots - 1, len(places_of(run.method)))
        #: Types whose latents are not aligned well enough: they neither tell nor hear.
        self.unaligned_types = frozenset(
            key for key in run.type_keys if not all(run.shares(key, place) for place in read)
        )
        self.classes = len(run.labels)
        self.spreads = np.asarray(run.spreads, np.float64)
        weighting = run.config.alignment.weighting
        rho = self.spreads ** (1.0 / weighting) if weighting else np.ones_like(self.spreads)
        self.metric = rho / np.maximum(self.spreads, 1e-12) ** 2
        self._pool = ClassPool(self.classes, self.metric, pull.MOST_TOLD * run.usual_examples)
        #: What has been told, by type.
        self._totals: dict[str, Classes] = {}
        #: How well each type agrees with the others, and those that have classes of their own alone.
        self.agreements: dict[str, float] = {}
        self.excluded_types: frozenset[str] = frozenset()
        self._told: set[str] = set()
        #: Of every client in the totals: how far its farthest class lies from the anchors.
        self._distances: dict[str, float] = {}
        self._classifiers: dict[str, LinearClassifier | None] = {}
        self._announced = False
        return None

    def state_dict(self) -> State:
        """What has been told so far."""
        told = self._pool.state_dict()
        return {"pool": told, "told": sorted(self._told), "distances": self._distances}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self._pool.load_state_dict(state["pool"])
        self._told, self._distances = set(state["told"]), dict(state["distances"])
        self._regroup()

    def requested_min_count(self, client_id: str) -> int:
        """Examples a class must have to be told of; 0: the client has told already, or has nothing to tell."""
        info = self.clients[client_id]
        silent = not info.train_examples or info.type_key in self.unaligned_types
        return 0 if silent or client_id in self._told else self.options.min_count

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """Ask once for class sums; bring the classifier where the client predicts, fits or is tested."""
        asked = self.requested_min_count(client_id) if "train" in purposes else 0
        acts = {"fit", "predict", "test"} & set(purposes)
        classifier = self.classifier(self.clients[client_id].type_key) if acts else None
        if not asked and classifier is None:
            return None
        return Request(classifier, asked, self.options.distill_share).to_payload()

    def classifier(self, type_key: str) -> LinearClassifier | None:
        """What clients of a type add to their logits, as it travels; None before anybody has told anything."""
        if type_key not in self._classifiers:
            self._classifiers[type_key] = self._classifier(type_key)
        return self._classifiers[type_key]

    def _classifier(self, type_key: str) -> LinearClassifier | None:
        total = self._behind(type_key)
        if type_key in self.unaligned_types or total is None or not total.counts.any():
            return None
        found = linear_discriminant(total.counts, total.sums, self.metric, self.options.prior)
        scale = np.float32(self.options.weight)
        return LinearClassifier(scale * found.weight, scale * found.bias).rounded

    def tensors(self) -> Tensors:
        """Weight (``C x r``) and bias (``C``) of every group, ``<group>/statistics.<name>``; none before any sums."""
        groups = {
            f"type/{key}" if self._by_itself(key) else "global": self.classifier(key)
            for key in self.type_keys
            if key not in self.unaligned_types
        }
        return {
            f"{group}/statistics.{name}": getattr(found, name)
            for group, found in groups.items()
            if found is not None
            for name in ("weight", "bias")
        }

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Add what clients tell; a client whose sums are refused is not asked again."""
        excluded, doubted = self.excluded_types, self.doubted
        refused: dict[str, str] = {}
        told: dict[str, ClassSums] = {}
        for client_id, payload in replies.items():
            if payload is None or not self.requested_min_count(client_id):
                continue
            self._told.add(client_id)
            declared = self.clients[client_id].train_examples
            try:
                sums = ClassSums.from_payload(payload)
                self._distances[client_id] = sums.check(
                    self.classes, self.spreads, self.options.min_count, declared
                )
            except ExchangeError as error:
                refused[client_id] = str(error)
                continue
            told[client_id] = sums
        usual = self._usual()
        for client_id, sums in told.items():
            distance = self._distances[client_id]
            if distance > max(_FARTHER * usual, _FAR):
                refused[client_id] = (
                    f"its classes lie {distance / usual:.3g} times as far away as is usual"
                )
                del self._distances[client_id]
            else:
                self._pool.add(client_id, self.clients[client_id].type_key, sums)
        if told:
            self._regroup()
        return Aggregated(self._log(), refused, self._notes(excluded, doubted))

    def _log(self) -> dict[str, Any]:
        """What is known now, for the journal."""
        examples = int(sum(float(total.counts.sum()) for total in self._totals.values()))
        known: dict[str, Any] = {"clients": len(self._distances), "examples": examples}
        if self.agreements:
            known["agreement"] = {key: round(v, 3) for key, v in self.agreements.items()}
            known["excluded_types"] = sorted(self.excluded_types)
        return known

    def _notes(self, excluded: Collection[str], doubted: Mapping[str, float]) -> list[Note]:
        """What has come to light since there were these excluded types and doubted clients."""
        notes = []
        for client_id in sorted(self.doubted.keys() - doubted):
            share = round(self.doubted[client_id], 3)
            text = f"what {client_id} tells of its classes counts for {100 * share:.0f} % of its examples"
            notes.append(Note(text, {"doubted": client_id, "to": share}))
        for key in sorted(self.excluded_types - set(excluded)):
            cosine = round(self.agreements[key], 3)
            text = f"the classes of {key} are not where others' are (agreement {cosine:.2f}): it keeps to its own"
            notes.append(Note(text, {"excluded_type": key, "agreement": cosine}))
        if not self._announced:
            self._announced = True
            notes.append(Note(_made_of(self._log())))
        return notes

    def _usual(self) -> float:
        """How far clients' farthest classes usually lie; no limit where too few have told."""
        found = [distance for distance in self._distances.values() if distance > 0]
        return median_low(found) if len(found) >= _COMPARABLE else math.inf

    def _by_itself(self, type_key: str) -> bool:
        return self.options.pool_over == "type" or type_key in self.excluded_types

    def _behind(self, type_key: str) -> Classes | None:
        """Whose classes a type's classifier is made of: its own, or those of all types that agree."""
        if self._by_itself(type_key):
            return self._totals.get(type_key)
        return pooled(
            total for key, total in self._totals.items() if key not in self.excluded_types
        )

    @property
    def doubted(self) -> dict[str, float]:
        """Clients whose examples count for less than half of what they told of, and for what share of it."""
        return {cid: share for cid, share in self._pool.shares.items() if share < _DOUBTED}

    def _regroup(self) -> None:
        """Find which types agree with the others, and pool what is told among those that do."""
        if self.options.pool_over == "all":
            self.agreements, self.excluded_types = who_agrees(
                self._pool.totals(), self.metric, self.options.min_cosine
            )
        groups = {key: key if self._by_itself(key) else "" for key in self.type_keys}
        self._totals = self._pool.totals(groups)
        self._classifiers.clear()


def _made_of(known: Mapping[str, Any]) -> str:
    """What the classifier is made of after the first round."""
    if not known["examples"]:
        return "class statistics: nobody has told anything of its classes"
    text = f"class statistics of {known['examples']} examples, told by {known['clients']} clients"
    if agreement := known.get("agreement"):
        text += f", agreement between types {min(agreement.values()):.2f} to {max(agreement.values()):.2f}"
    return text


Channel = PooledClassifier
