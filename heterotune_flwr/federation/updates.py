"""What a client's training becomes on the server, and which of it is let in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.cmga.robust import RobustMean
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.packing import Tensors, tensor_digest
from heterotune_flwr.exchange.spill import Stored, loaded
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.rates import path_length

Shapes = dict[str, tuple[int, ...]]
#: Keys of what is journalled of replies and of rounds that no metric of a client may take.
RESERVED = frozenset(
    {
        "event", "time", "strategy", "seed", "round", "of", "client_id", "type", "types", "clients", "client_seconds",
        "channels", "bytes_up", "bytes_down",
    }
)  # fmt: skip
_NOT_AVERAGED = RESERVED | {"examples", "steps", "learning_rate", "seconds", "peak_memory_mb"}


@dataclass(frozen=True)
class Work:
    """What was asked of a client: at most these examples and steps, at this learning rate, with this optimizer.

    The rate is the one after the warm-up, which takes ``warmup_ratio`` of the steps. ``clip_norm`` limits the norm of
    a step's gradient. Whatever the client has, it counts as ``most`` examples at most (:mod:`..cmga.pull`).
    """

    examples: int
    steps: int
    learning_rate: float
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    warmup_ratio: float = 0.0
    most: float = math.inf


@dataclass(frozen=True)
class ClientUpdate:
    """One admitted update: ``deltas`` = trained minus received values, by canonical name.

    Of very many updates ``deltas`` is a mapping that reads from a file (:mod:`..exchange.spill`).
    """

    client_id: str
    type_key: str
    examples: float
    steps: float
    learning_rate: float
    deltas: Mapping[str, NDArray[np.float32]]
    warmup_ratio: float = 0.0

    @property
    def path_length(self) -> float:
        """Sum of the steps' learning rates."""
        return path_length(math.ceil(self.steps), self.learning_rate, self.warmup_ratio)

    def only(self, names: Iterable[str]) -> ClientUpdate:
        """The same update restricted to some tensors."""
        if isinstance(self.deltas, Stored):
            return replace(self, deltas=self.deltas.only(names))
        return replace(self, deltas={name: self.deltas[name] for name in names})


def as_update(reply: TrainReply, type_key: str, asked: Work) -> ClientUpdate:
    """Read an update and its weights out of a reply.

    Raises
    ------
    FederationError
        The client answers for another model type, or claims work that was not asked of it.

    """
    if reply.type_key != type_key:
        raise FederationError(f"answers as type {reply.type_key} instead of {type_key}")
    weights = {
        name: reply.metrics.get(name, 0.0) for name in ("examples", "steps", "learning_rate")
    }
    for name, value in weights.items():
        if not (np.isfinite(value) and value > 0):
            raise FederationError(f"reports {name} = {value}, which must be above 0")
    if not np.isclose(weights["learning_rate"], asked.learning_rate, rtol=1e-5):
        rate = weights["learning_rate"]
        raise FederationError(f"reports learning_rate = {rate} instead of {asked.learning_rate}")
    for name, limit in (("examples", asked.examples), ("steps", asked.steps)):
        if weights[name] > limit:
            raise FederationError(f"reports {name} = {weights[name]}, more than its {limit}")
    weights["examples"] = min(weights["examples"], asked.most)
    return ClientUpdate(
        reply.client_id,
        type_key,
        **weights,
        deltas=reply.deltas,
        warmup_ratio=asked.warmup_ratio,
    )


def norm_of(deltas: Mapping[str, NDArray[np.float32]]) -> float:
    """Euclidean norm over all tensors."""
    if isinstance(deltas, Stored) and deltas.norm is not None:
        return deltas.norm
    squares = [float(np.sum(np.square(value, dtype=np.float64))) for value in deltas.values()]
    return float(np.sqrt(sum(squares)))


def numbers_of(deltas: Mapping[str, NDArray[np.float32]]) -> int:
    """How many numbers all tensors have."""
    if isinstance(deltas, Stored):
        return deltas.size
    return sum(value.size for value in deltas.values())


def fingerprint_of(deltas: Mapping[str, NDArray[np.float32]]) -> str:
    """Identity of an update's numbers; empty for one that moves nothing (which may well come twice)."""
    if isinstance(deltas, Stored) and deltas.fingerprint is not None:
        return deltas.fingerprint
    moves = any(np.any(value) for value in deltas.values())
    return tensor_digest(deltas) if moves else ""


def check_update(update: ClientUpdate, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Exactly the expected tensors, their shapes, every number finite.

    One NaN averaged in would spoil the bank for everybody.

    Raises
    ------
    FederationError
        One line about the first thing that is wrong.

    """
    if set(update.deltas) != set(expected):
        odd = sorted(set(update.deltas) ^ set(expected))[0]
        verb = "lacks the" if odd in expected else "brings the unexpected"
        raise FederationError(f"{verb} tensor {odd}")
    for name, shape in expected.items():
        got = update.deltas[name]
        if got.shape != tuple(shape):
            raise FederationError(f"sends {name} as {list(got.shape)}, expected {list(shape)}")
        if not np.isfinite(got).all():
            raise FederationError(f"sends numbers in {name} that are not finite")


def check_step(
    step: Mapping[str, NDArray[np.floating[Any]]],
    tensors: Mapping[str, NDArray[np.floating[Any]]],
    where: str,
) -> None:
    """Refuse a step that does not fit the tensors it is to change, or is not finite: they stay as they were.

    Raises
    ------
    FederationError
        One line about the first thing that is wrong.

    """
    if not isinstance(step, Mapping):
        kind = type(step).__name__
        raise FederationError(f"{where}: combine returned a {kind}, not arrays by tensor name")
    for name, value in step.items():
        if name not in tensors:
            raise FederationError(
                f"{where}: combine returned {name!r}, which is no tensor of the group"
            )
        if not isinstance(value, np.ndarray) or value.shape != tensors[name].shape:
            got = list(value.shape) if isinstance(value, np.ndarray) else type(value).__name__
            raise FederationError(
                f"{where}: combine returned {name} as {got}, an array {list(tensors[name].shape)} is needed"
            )
        if not np.isfinite(value).all():
            raise FederationError(
                f"{where}: combining the updates gave numbers in {name} that are not finite"
            )


def mean_delta(updates: Sequence[ClientUpdate], rule: RobustMean | None = None) -> Tensors:
    """Example-weighted mean per tensor over those that have it (FedAvg, arXiv 1602.05629), or a robust rule.

    Summed in float64 in client order, so neither the order of arrival nor of dictionaries shows. A robust rule sees
    the tensors that the same clients have as one vector.
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    if rule is not None and rule.rule != "mean":
        return _robust_delta(ordered, rule)
    totals: dict[str, float] = {}
    for update in ordered:
        for name in update.deltas:
            totals[name] = totals.get(name, 0) + update.examples
    means: dict[str, NDArray[np.float64]] = {}
    for update in ordered:  # one after the other: very many are not in memory
        for name, delta in loaded(update.deltas).items():
            if name not in means:
                means[name] = np.zeros(delta.shape, dtype=np.float64)
            means[name] += (update.examples / totals[name]) * delta
    return {name: means[name].astype(np.float32) for name in sorted(means)}


def _robust_delta(ordered: Sequence[ClientUpdate], rule: RobustMean) -> Tensors:
    together: dict[tuple[str, ...], list[str]] = {}
    for name in sorted({name for update in ordered for name in update.deltas}):
        having = tuple(update.client_id for update in ordered if name in update.deltas)
        together.setdefault(having, []).append(name)
    step: Tensors = {}
    for having, names in together.items():
        members = [update for update in ordered if update.client_id in having]
        flat = [np.concatenate([u.deltas[n].reshape(-1) for n in names]) for u in members]
        vector = rule(flat, [update.examples for update in members])
        start = 0
        for name in names:
            shape, size = members[0].deltas[name].shape, members[0].deltas[name].size
            step[name] = vector[start : start + size].reshape(shape).astype(np.float32)
            start += size
    return step


def training_summary(reports: Sequence[TrainReply]) -> dict[str, Any]:
    """Example-weighted means of what clients report, over all and per type; sums and maxima."""

    def means(chosen: Sequence[TrainReply]) -> dict[str, float]:
        total = sum(report.metrics["examples"] for report in chosen)
        names = {name for report in chosen for name in report.metrics} - _NOT_AVERAGED
        result: dict[str, float] = {}
        for name in sorted(names):
            having = [report for report in chosen if name in report.metrics]
            if len(having) == len(chosen):
                weighted = (r.metrics["examples"] * r.metrics[name] for r in having)
                result[name] = float(sum(weighted) / total)
        return result

    keys = sorted({report.type_key for report in reports})
    summary: dict[str, Any] = dict(means(reports))
    summary["clients"] = len(reports)
    summary["client_seconds"] = float(sum(r.metrics.get("seconds", 0.0) for r in reports))
    peaks = [r.metrics["peak_memory_mb"] for r in reports if "peak_memory_mb" in r.metrics]
    if peaks:
        summary["peak_memory_mb"] = max(peaks)
    summary["types"] = {
        key: means([report for report in reports if report.type_key == key]) for key in keys
    }
    return summary
