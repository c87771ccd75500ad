"""Rows of the headline that need no Flower: floor, ceiling, controls and closed forms, in seconds a run on kept states.

Every row has a grid of values, chosen among on dev, and may have variants of which each tries all values. What a row
gives is which texts of the task every client has right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.science.laboratory import common_encoder as encoder
from benchmarks.science.laboratory.claim_states import ClaimTask, Owned
from benchmarks.science.laboratory.clients import LatentTask, Schedule
from benchmarks.science.laboratory.federation import federate, hits
from benchmarks.science.laboratory.pooled import Pool, train_pooled
from benchmarks.science.laboratory.rows import METHOD, TYPE_PHASE
from benchmarks.science.ngrams import NgramView, told
from heterotune_flwr.channels.statistics.server import linear_discriminant

#: Values x seeds x clients x texts.
Hits = NDArray[np.bool_]
#: The rounds, steps and batch of ``conf/real.yaml``, which the suites run.
SCHEDULE = Schedule(rounds=10, steps=12)
#: Four trials for every row, as for the rivals that train through whole backbones.
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
#: Bytes of a number on the wire (bf16, the default codec).
_WIDTH = 2


class Field:
    """A suite as the laboratory has it: a task, the types in the order of their clients, and how many each has."""

    def __init__(self, task: ClaimTask, specs: Sequence[str], smallest: str, each: int) -> None:
        self.task, self.specs, self.each = task, list(specs), each
        self.smallest = self.specs.index(smallest)

    @property
    def count(self) -> int:
        """All clients."""
        return self.each * len(self.specs)

    @functools.cached_property
    def kinds(self) -> list[int]:
        """Type of every client, in turn as in the product."""
        return [client % len(self.specs) for client in range(self.count)]

    @functools.cached_property
    def latent(self) -> list[LatentTask]:
        """The task as every type sees it."""
        return self.task.latent_tasks(self.specs)

    @functools.cached_property
    def right(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Right labels of what is trained on and of what is tested: all texts, of which rows pick theirs."""
        return self.task.targets, self.task.targets

    def owned(self, seed: int) -> list[Owned]:
        """What every client holds."""
        return self.task.clients(self.count, seed)

    def labels(self, places: Sequence[int]) -> NDArray[np.int64]:
        """Labels of some texts."""
        found: NDArray[np.int64] = self.task.targets[list(places)].numpy()
        return found

    def of_all(self, guesses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """What one classifier of everybody's has right, the same for all clients (clients x texts)."""
        return np.tile(guesses == self.task.targets.numpy(), (self.count, 1))

    @functools.cached_property
    def features(self) -> dict[str, encoder.Matrix]:
        """What the smallest model reads of all texts: two views and both, standardised (on public texts) or raw."""
        spec, found = self.specs[self.smallest], {}
        for name, view in (("last", ""), ("text", "text")):
            texts, public = (part.astype(np.float64) for part in self.task.states(spec, view))
            mean, spread = encoder.standardised(public)
            found[name], found[f"{name}, raw"] = (texts - mean) / spread, texts
        return {**found, "both": np.concatenate([found["last"], found["text"]], axis=1)}


Run = Callable[[Field, Sequence[int], Sequence[float], str], Hits]


@dataclass(frozen=True)
class LabRow:
    """A row: how it is run, its values and variants; the factor by which a grid goes on at its edge; bytes sent up.

    ``bytes_up``: of a client, in the whole run, where it is known without a wire. ``needs``: what states it is made of,
    all types' latents, the smallest model's features, or none.
    """

    run: Run
    values: tuple[float, ...] = (0.0,)
    variants: tuple[str, ...] = ("",)
    factor: float | None = None
    bytes_up: Callable[[Field, str], int] | None = None
    needs: str = "latent"

    def prepare(self, field: Field) -> None:
        """Compute or read the states, which are no part of a run's seconds."""
        if self.needs:
            getattr(field, self.needs)


def _untouched(field: Field, seeds: Sequence[int], values: Sequence[float], _: str) -> Hits:
    right = [(own.pool_logits.argmax(-1) == field.task.targets).numpy() for own in field.latent]
    clients = np.stack([right[kind] for kind in field.kinds])
    return np.tile(clients, (len(values), len(seeds), 1, 1))


def _majority(field: Field, seeds: Sequence[int], values: Sequence[float], _: str) -> Hits:
    found = []
    for seed in seeds:
        places = [place for own in field.owned(seed) for place in own.train]
        most = np.bincount(field.labels(places)).argmax()
        found.append(field.of_all(np.full(len(field.task.texts), most)))
    return np.stack(found)[None]


def _federated(sharing: str, **changed: Any) -> Run:
    def run(field: Field, seeds: Sequence[int], rates: Sequence[float], _: str) -> Hits:
        shares = [own.train for seed in seeds for own in field.owned(seed)]
        schedule = replace(SCHEDULE, rates=tuple(rates), **changed)
        found: Hits = federate(
            field.latent, field.right, shares, field.count, list(seeds), METHOD, schedule,
            (sharing,), measure=hits,
        )[sharing]  # fmt: skip
        return found

    return run


def _smallest(field: Field, seeds: Sequence[int], rates: Sequence[float], _: str) -> Hits:
    """The bank of all clients, who all have the smallest model."""
    shares = [own.train for seed in seeds for own in field.owned(seed)]
    found: Hits = federate(
        [field.latent[field.smallest]], field.right, shares, field.count, list(seeds), METHOD,
        replace(SCHEDULE, rates=tuple(rates)), ("within",), measure=hits,
    )["within"]  # fmt: skip
    return found


def _pooled(read_by_all: bool) -> Run:
    def run(field: Field, seeds: Sequence[int], rates: Sequence[float], _: str) -> Hits:
        readers = range(len(field.specs)) if read_by_all else (-1,)
        wanted = [(rate, seed, reader) for rate in rates for seed in seeds for reader in readers]
        places, read_by = [], []
        for _rate, seed, reader in wanted:
            owned = field.owned(seed)
            places.append([place for own in owned for place in own.train])
            read_by.append([
                kind if reader < 0 else reader
                for own, kind in zip(owned, field.kinds, strict=True)
                for _ in own.train
            ])  # fmt: skip
        pool = Pool(torch.tensor(places), torch.tensor(read_by))
        rate_of = torch.tensor([rate for rate, *_ in wanted])
        run_seeds = [seed for _, seed, _ in wanted]
        bank = train_pooled(
            field.latent, field.task.targets, pool, rate_of, run_seeds, METHOD, SCHEDULE
        )
        found = np.empty((len(rates), len(seeds), field.count, len(field.task.texts)), bool)
        for kind in range(len(field.specs)):
            start, step = (kind, len(field.specs)) if read_by_all else (0, 1)
            own = {key: value[start::step] for key, value in bank.items()}
            kinds = torch.full((len(own["down"]),), kind)
            right = hits(own, field.latent, kinds, field.task.targets)
            shaped = right.reshape(len(rates), len(seeds), 1, -1)
            found[:, :, kind :: len(field.specs)] = shaped
        return found

    return run


@functools.cache
def _ngram_features(task: ClaimTask) -> NDArray[np.float32]:
    return NgramView(task.public).of_texts(task.texts)


def _ngrams(field: Field, seeds: Sequence[int], priors: Sequence[float], _: str) -> Hits:
    z = _ngram_features(field.task)
    classes, metric = len(field.task.labels), np.ones(z.shape[1])
    found = np.empty((len(priors), len(seeds), field.count, len(z)), bool)
    for place, seed in enumerate(seeds):
        parts = [told(z[o.train], field.labels(o.train), classes, 1) for o in field.owned(seed)]
        together = sum(parts[1:], start=parts[0])
        for number, prior in enumerate(priors):
            solved = linear_discriminant(together.counts, together.sums, metric, prior)
            found[number, place] = field.of_all((z @ solved.weight.T + solved.bias).argmax(axis=1))
    return found


def _means_of(field: Field, seed: int, variant: str, heaps: int) -> encoder.ClassMeans:
    z = field.features[variant]
    parts = [
        encoder.told_means(z[own.train], field.labels(own.train), heaps)
        for own in field.owned(seed)
    ]
    return sum(parts[1:], start=parts[0])


def _fedncm(field: Field, seeds: Sequence[int], values: Sequence[float], variant: str) -> Hits:
    classes, z = len(field.task.labels), field.features[variant]
    solved = [encoder.nearest_mean(_means_of(field, seed, variant, 1), classes) for seed in seeds]
    return np.stack([field.of_all(encoder.guesses(one, z)) for one in solved])[None]


def _heaps(variant: str) -> int:
    return int(variant.partition(" ")[0])


def _fedcof(field: Field, seeds: Sequence[int], gammas: Sequence[float], variant: str) -> Hits:
    classes, z = len(field.task.labels), field.features["both"]
    found = np.empty((len(gammas), len(seeds), field.count, len(z)), bool)
    for place, seed in enumerate(seeds):
        means = _means_of(field, seed, "both", _heaps(variant))
        for number, gamma in enumerate(gammas):
            solved = encoder.covariances_for_free(means, classes, gamma)
            found[number, place] = field.of_all(encoder.guesses(solved, z))
    return found


def _sent(field: Field, variant: str, heaps: int) -> int:
    """Mean over clients of the bytes of what they tell, on the first seed of the table."""
    means = _means_of(field, 20, variant, heaps)
    return _WIDTH * means.numbers // field.count


_NCM = ("last, raw", "text, raw", "text", "both")
ROWS: Mapping[str, LabRow] = {
    "untouched": LabRow(_untouched, bytes_up=lambda *_: 0),
    "majority": LabRow(_majority, bytes_up=lambda *_: 0, needs=""),
    "alone": LabRow(_federated("alone"), RATES, factor=2.0, bytes_up=lambda *_: 0),
    "within": LabRow(_federated("within"), RATES, factor=2.0),
    "smallest": LabRow(_smallest, RATES, factor=2.0),
    "pooled_latents": LabRow(_pooled(False), RATES, factor=2.0),
    "pooled_data": LabRow(_pooled(True), RATES, factor=2.0),
    "pooled_ngrams": LabRow(_ngrams, (1, 2, 4, 8), factor=2.0, needs=""),
    "fedncm": LabRow(
        _fedncm, variants=_NCM, bytes_up=lambda f, v: _sent(f, v, 1), needs="features"
    ),
    "fedcof": LabRow(
        _fedcof,
        (0.1, 1),
        ("1 mean", "3 means"),
        10.0,
        lambda f, v: _sent(f, "both", _heaps(v)),
        "features",
    ),
    "bank_and_predictions": LabRow(_federated("across", **TYPE_PHASE), RATES, factor=2.0),
}
