"""The shared discriminant: what every type's labelled examples say, in the space all types share, in closed form.

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
whose classes lie elsewhere than the other types' (:func:`agreement`) is left to its own, the one that agrees least
first, until all that are left agree.

Statistics of classes from clients that share *one* frozen model: FedCGS (arXiv 2503.06962), CCVR (arXiv 2106.05001).
That models of different families can pool theirs is what the alignment is for (our definition).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.channels.statistics.class_pool import Classes, ClassPool
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.cmga import pull
from heterotune_flwr.config.options import check_between, check_keys, check_number, check_scope
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.schema import MethodConfig

#: A client whose farthest class lies this many times as far away as others' is refused, where so many can be compared
#: and it lies further off than honest ones do (root mean square over latents, in their standard deviations).
_FARTHER, _COMPARABLE, _FAR = 3.0, 3, 3.0
#: A client whose examples count for less than this share of what it told of is put on record.
_DOUBTED = 0.5
#: A type is judged by so many classes in common with the others, and so many examples of them per label of the task.
_IN_COMMON, _JUDGED = 3, 2
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of a strategy's ``discriminant``.

    Attributes
    ----------
    weight
        Of its logits beside the model's logits.
    min_count
        A client tells nothing of classes of which it has fewer examples: the sum of one is that example's latents.
    prior
        k, examples at the mean of all classes that are added to every class.
    pool_over
        Whose examples a client's is made of: ``all``, or those of its own ``type``, where nothing crosses types.
    distill_share
        Share of it, 0 to 1, that a client has in its own predictions while it fits the others', in which all of it is:
        at 0 it learns what the others' discriminant says and the tests add its own again, at 1 it learns the rest.
    min_cosine
        Cosine with the other types' classes (:func:`agreement`) below which a type has those of its own alone; -1: all
        are pooled.

    """

    weight: float = 0.1
    min_count: int = 2
    prior: float = 2.0
    pool_over: str = "all"
    distill_share: float = 0.5
    min_cosine: float = 0.06

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> StatisticsOptions:
        """Read a YAML entry (ConfigError names what is wrong)."""
        check_keys("statistics", given, [field.name for field in dataclasses.fields(cls)])
        for key, value in given.items():
            if key == "pool_over":
                check_scope("statistics", value)
            elif key == "min_cosine":
                check_between("statistics.min_cosine", value, -1.0, 1.0)
            elif key == "distill_share":
                check_between("statistics.distill_share", value, 0.0, 1.0)
            else:
                whole = key == "min_count"
                check_number(f"statistics.{key}", value, whole, least=int(whole))
        return cls(**given)

    @classmethod
    def optional(cls, given: Mapping[str, Any] | None) -> StatisticsOptions | None:
        """The same of an entry that may be null; None for that, and where the weight is 0."""
        options = None if given is None else cls.read(given)
        return options if options is not None and options.weight > 0 else None


def agreement(one: Classes, other: Classes, metric: Matrix) -> float | None:
    """Cosine, under the metric, of where two sides' classes lie from their own middle; None where it says nothing.

    Over the classes that both have told of, each by ``w_c = n_c n'_c / (n_c + n'_c)``: the middle is the mean of a
    side's class means with these weights, so that neither other classes, nor how often one occurs, nor where all of a
    side's texts lie makes a difference. It says nothing of fewer than three classes in common, or few examples of them.
    """
    shared = (one.counts > 0) & (other.counts > 0)
    counts = [side.counts[shared] for side in (one, other)]
    enough = _JUDGED * len(shared)
    if shared.sum() < _IN_COMMON or min(float(side.sum()) for side in counts) < enough:
        return None
    weights = (counts[0] * counts[1] / (counts[0] + counts[1]))[:, None]
    sides = []
    for side, own in zip((one, other), counts, strict=True):
        means = side.sums[shared] / own[:, None]
        sides.append(means - (weights * means).sum(axis=0) / weights.sum())
    left, right = sides
    lengths = [float((weights * side * metric * side).sum()) for side in sides]
    if min(lengths) <= 0:
        return None
    return float((weights * left * metric * right).sum()) / math.sqrt(lengths[0] * lengths[1])


def who_agrees(
    totals: Mapping[str, Classes], metric: Matrix, limit: float
) -> tuple[dict[str, float], frozenset[str]]:
    """How well every type agrees with the others, and those that agree less than ``limit``.

    The type that agrees least is taken out first, and the others are compared anew; it keeps the number it went with.
    Of two that are left and disagree nobody knows which is right: both are taken out. A type of which nothing can be
    said stays.
    """
    found: dict[str, float] = {}
    members = sorted(totals)
    while len(members) > 1:
        now: dict[str, float] = {}
        for key in members:
            others = _pooled(totals[other] for other in members if other != key)
            assert others is not None
            if (value := agreement(totals[key], others, metric)) is not None:
                now[key] = value
        found |= now
        worst = min(now, key=lambda key: now[key], default=None)
        if worst is None or now[worst] >= limit:
            break
        members = [] if len(members) == 2 else [key for key in members if key != worst]
    return found, frozenset(totals) - frozenset(members)


def linear_discriminant(
    counts: Matrix, sums: Matrix, metric: Matrix, prior: float
) -> LinearClassifier:
    """The discriminant of pooled classes, its logits zero at the mean of all examples.

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


def without_views(method: MethodConfig) -> MethodConfig:
    """The method where there is no discriminant, which alone reads the further views of a text."""
    return dataclasses.replace(method, text_view=False)


class PooledClassifier:
    """The server's side: asks every client once, adds up, hands out.

    Parameters
    ----------
    options
        See :class:`StatisticsOptions`.
    spreads
        Standard deviation of every latent over the anchors (``r``).
    weighting
        ``alignment.weighting``: spreads are correlations to this power.
    roster
        The clients, and the label set they share.
    apart
        Types whose latents are not aligned well enough: they neither tell nor hear.

    """

    def __init__(
        self,
        options: StatisticsOptions,
        spreads: Matrix,
        weighting: float,
        roster: Roster,
        unaligned_types: Collection[str] = (),
    ) -> None:
        self.options, self.roster, self.unaligned_types = (
            options,
            roster,
            frozenset(unaligned_types),
        )
        self.classes = len(roster.labels or ())
        self.spreads = np.asarray(spreads, np.float64)
        rho = self.spreads ** (1.0 / weighting) if weighting else np.ones_like(self.spreads)
        self.metric = rho / np.maximum(self.spreads, 1e-12) ** 2
        most = pull.MOST_TOLD * self.roster.usual_examples
        self._pool = ClassPool(self.classes, self.metric, most)
        #: What has been told, by type.
        self._totals: dict[str, Classes] = {}
        #: How well each type agrees with the others, and those that have classes of their own alone.
        self.agreements: dict[str, float] = {}
        self.excluded_types: frozenset[str] = frozenset()
        self._told: set[str] = set()
        #: Of every client in the totals: how far its farthest class lies from the anchors.
        self._reaches: dict[str, float] = {}

    def state_dict(self) -> State:
        """What has been told so far."""
        told = self._pool.state_dict()
        return {"pool": told, "told": sorted(self._told), "reaches": self._reaches}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        self._pool.load_state_dict(state["pool"])
        self._told, self._reaches = set(state["told"]), dict(state["reaches"])
        self._settle()

    def requested_min_count(self, client_id: str) -> int:
        """Examples a class must have to be told of; 0: the client has told already, or has nothing to tell."""
        info = self.roster.clients[client_id].info
        silent = not info.train_examples or info.type_key in self.unaligned_types
        return 0 if silent or client_id in self._told else self.options.min_count

    def of(self, type_key: str) -> LinearClassifier | None:
        """What clients of a type add to their logits; None before anybody has told anything."""
        total = self._behind(type_key)
        if type_key in self.unaligned_types or total is None or not total.counts.any():
            return None
        found = linear_discriminant(total.counts, total.sums, self.metric, self.options.prior)
        scale = np.float32(self.options.weight)
        scaled = LinearClassifier(
            scale * found.weight, scale * found.bias, self.options.distill_share
        )
        return scaled.rounded

    def tensors(self) -> Tensors:
        """Weight (``C x r``) and bias (``C``) of every group, ``<group>/statistics.<name>``; none before any sums."""
        groups = {
            f"type/{key}" if self._by_itself(key) else "global": self.of(key)
            for key in self.roster.type_keys
            if key not in self.unaligned_types
        }
        return {
            f"{group}/statistics.{name}": getattr(found, name)
            for group, found in groups.items()
            if found is not None
            for name in ("weight", "bias")
        }

    def aggregate(self, reports: Sequence[TrainReply]) -> tuple[dict[str, Any], dict[str, str]]:
        """Add what clients tell.

        Returns what is known now (for the journal), and reasons by client id for sums that were refused; such a client
        is not asked again.
        """
        refused: dict[str, str] = {}
        told: dict[str, TrainReply] = {}
        for report in sorted(reports, key=lambda report: report.client_id):
            if report.class_sums is None or not self.requested_min_count(report.client_id):
                continue
            self._told.add(report.client_id)
            declared = self.roster.clients[report.client_id].info.train_examples
            try:
                self._reaches[report.client_id] = report.class_sums.check(
                    self.classes, self.spreads, self.options.min_count, declared
                )
            except ExchangeError as error:
                refused[report.client_id] = str(error)
                continue
            told[report.client_id] = report
        usual = self._usual()
        for client_id, report in told.items():
            reach = self._reaches[client_id]
            if reach > max(_FARTHER * usual, _FAR):
                refused[client_id] = (
                    f"its classes lie {reach / usual:.3g} times as far away as is usual"
                )
                del self._reaches[client_id]
            elif report.class_sums is not None:
                self._pool.add(client_id, report.type_key, report.class_sums)
        if told:
            self._settle()
        examples = int(sum(float(total.counts.sum()) for total in self._totals.values()))
        known: dict[str, Any] = {"clients": len(self._reaches), "examples": examples}
        if self.agreements:
            known["agreement"] = {key: round(v, 3) for key, v in self.agreements.items()}
            known["excluded_types"] = sorted(self.excluded_types)
        return known, refused

    def _usual(self) -> float:
        """How far clients' farthest classes usually lie; no limit where too few have told."""
        reaches = [reach for reach in self._reaches.values() if reach > 0]
        return statistics.median_low(reaches) if len(reaches) >= _COMPARABLE else math.inf

    def _by_itself(self, type_key: str) -> bool:
        return self.options.pool_over == "type" or type_key in self.excluded_types

    def _behind(self, type_key: str) -> Classes | None:
        """Whose classes a type's discriminant is made of: its own, or those of all types that agree."""
        if self._by_itself(type_key):
            return self._totals.get(type_key)
        return _pooled(
            total for key, total in self._totals.items() if key not in self.excluded_types
        )

    @property
    def doubted(self) -> dict[str, float]:
        """Clients whose examples count for less than half of what they told of, and for what share of it."""
        return {cid: share for cid, share in self._pool.shares.items() if share < _DOUBTED}

    def _settle(self) -> None:
        """Find which types agree with the others, and pool what is told among those that do."""
        if self.options.pool_over == "all":
            self.agreements, self.excluded_types = who_agrees(
                self._pool.totals(), self.metric, self.options.min_cosine
            )
        groups = {key: key if self._by_itself(key) else "" for key in self.roster.type_keys}
        self._totals = self._pool.totals(groups)


def _pooled(totals: Iterable[Classes]) -> Classes | None:
    parts = list(totals)
    return functools.reduce(operator.add, parts) if parts else None
