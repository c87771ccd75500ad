"""The rows of the experiment on answers: what is shared, whose answers teach, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.science.laboratory.clients import Schedule
from benchmarks.science.laboratory.text_clients import (
    Bank,
    Order,
    Pupil,
    Term,
    first_bank,
    own_loss,
    test_losses,
    train,
)
from benchmarks.science.laboratory.text_consensus import Targets
from benchmarks.science.laboratory.text_deal import Holder
from benchmarks.science.laboratory.text_sums import TokenSums
from benchmarks.science.laboratory.text_world import BEGINS, Corpus, World
from heterotune_flwr.seeds import generator

#: Rounds, steps a round, texts a step. The rate is the row's.
SCHEDULE = Schedule(rounds=8, steps=12, batch=8)
#: Public prompts about which clients say something in a round, and of which a step has some beside own texts.
DRAWN, LESSON = 48, 4
#: The round after which clients first say something: before, they have little to say.
FIRST_SAID = 3


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes
    ----------
    bank
        Over whom banks are averaged: ``client`` (nobody), ``type``, ``all``; ``central``: one bank, trained on
        everybody's latents at once.
    pooled
        Everybody trains on everybody's examples.
    maps
        ``none``, the alignment's control, or ``begins``: read where answers begin, not at all their positions.
    teach
        Which public answers are talked about (:data:`.text_world.PUBLIC`, or ``client``); empty: none.
    words
        These answers are learnt as they are: no distributions.
    voices
        Whose distributions are averaged: ``all``; ``type``: the own type's; ``untrained``: all, but those of other
        types are bare.
    sums
        Pooled token sums besides.
    smallest
        Everybody owns the first type.
    guest
        Every type takes the bank of the others, who train inside their types, and trains nothing itself.

    """

    bank: str = "type"
    pooled: bool = False
    maps: str = "none"
    teach: str = ""
    words: bool = False
    voices: str = "all"
    sums: bool = False
    smallest: bool = False
    guest: bool = False


#: Those that decide come first, and with all seeds before the others.
ROWS: Mapping[str, Row] = {
    "within type": Row(),
    "pooled data": Row(pooled=True),
    "top-8, bare answers": Row(teach="bare"),
    "top-8, bare answers, inside the type": Row(teach="bare", voices="type"),
    "top-8, bare answers, others untrained": Row(teach="bare", voices="untrained"),
    "top-8, human answers": Row(teach="human"),
    "bank": Row(bank="all"),
    "bank, random maps": Row(bank="all", maps="random_maps"),
    "bank, aligned where answers begin": Row(bank="all", maps=BEGINS),
    "top-8, other tasks' prompts": Row(teach="elsewhere"),
    "alone": Row(bank="client"),
    "token sums": Row(sums=True),
    "bank and token sums": Row(bank="all", sums=True),
    "top-8, bare answers, and token sums": Row(teach="bare", sums=True),
    "top-8, bare answers, and bank": Row(bank="all", teach="bare"),
    "top-8, human answers, and bank": Row(bank="all", teach="human"),
    "pooled latents": Row(bank="central"),
    "top-8, other tasks' prompts, inside the type": Row(teach="elsewhere", voices="type"),
    "top-8, human answers, inside the type": Row(teach="human", voices="type"),
    "everybody on the smallest": Row(smallest=True),
    "top-8, a drawn client's answers": Row(teach="client"),
    "answers in words": Row(teach="client", words=True),
    "guest with the bank": Row(guest=True),
}
DECIDING = tuple(ROWS)[:10]


def federate(
    row: Row, world: World, holders: Sequence[Holder], rate: float, seed: int, rounds: int | None = None,
    schedule: Schedule = SCHEDULE,
) -> Iterator[list[Bank]]:  # fmt: skip
    """Banks of all clients after every round, as they would be tested then."""
    schedule = replace(schedule, rates=(rate,))
    banks = [first_bank(seed) for _ in holders]
    school = School(row, world, holders, seed) if row.teach else None
    for round in range(1, (rounds or schedule.rounds) + 1):
        if row.bank == "central":
            terms = [
                _term(world, h.kind, h.rows, schedule, seed, round, i)
                for i, h in enumerate(holders)
            ]
            one = train(banks[0], schedule, [_mean(terms)])
            banks = [one] * len(holders)
            yield banks
            continue
        trained = []
        for i, holder in enumerate(holders):
            rows = [r for h in holders for r in h.rows] if row.pooled else holder.rows
            terms = [_term(world, holder.kind, rows, schedule, seed, round, i)]
            if school is not None and round > FIRST_SAID:
                terms.append(school.term(i, round))
            trained.append(train(banks[i], schedule, terms))
        if school is not None and round >= FIRST_SAID:
            school.hear(trained, round)
        kinds = [holder.kind for holder in holders]
        banks = averaged(trained, kinds, row.bank)
        yield of_others(trained, kinds) if row.guest else banks


def _term(
    world: World, kind: int, rows: Sequence[int], schedule: Schedule, seed: int, round: int, client: int
) -> Term:  # fmt: skip
    order = Order(rows, generator(seed, f"texts.batches.{round}.{client}"))
    view = world.views[kind]
    return lambda bank: own_loss(bank, view, view.train, order.draw(schedule.batch))


def _mean(terms: Sequence[Term]) -> Term:
    return lambda bank: torch.stack([term(bank) for term in terms]).mean()


def averaged(banks: Sequence[Bank], kinds: Sequence[int], scope: str) -> list[Bank]:
    """The mean inside each type, over all types (each counts alike), or nothing."""
    if scope == "client":
        return list(banks)
    means = {
        kind: _mean_bank([bank for bank, own in zip(banks, kinds, strict=True) if own == kind])
        for kind in set(kinds)
    }
    if scope == "all":
        everybody = _mean_bank(list(means.values()))
        return [everybody] * len(banks)
    return [means[kind] for kind in kinds]


def of_others(banks: Sequence[Bank], kinds: Sequence[int]) -> list[Bank]:
    """For every client, the mean of the banks of other types."""
    pairs = list(zip(banks, kinds, strict=True))
    return [_mean_bank([bank for bank, other in pairs if other != kind]) for kind in kinds]


def _mean_bank(banks: Sequence[Bank]) -> Bank:
    return {key: torch.stack([bank[key] for bank in banks]).mean(0) for key in banks[0]}


class School:
    """Public answers in a run: who says what about which, and what each is taught of it."""

    def __init__(self, row: Row, world: World, holders: Sequence[Holder], seed: int) -> None:
        public = world.public[row.teach]
        if row.words:
            public = replace(public, pairs=[pairs[:0] for pairs in public.pairs])
        self._words = row.words
        self._pupils = [Pupil.of(view, public, kind) for kind, view in enumerate(world.views)]
        self._kinds = [holder.kind for holder in holders]
        self._voices, self._seed = row.voices, seed
        count = sum(map(len, public.pairs))
        groups = {0} if row.voices == "all" else set(self._kinds)
        self._targets = {group: Targets(count) for group in groups}
        self._prompts = [n for n, pairs in enumerate(public.pairs) if row.words or len(pairs)]
        self._drawn: list[int] = []

    def hear(self, banks: Sequence[Bank], round: int) -> None:
        """Clients say what they make of newly drawn prompts."""
        rng = generator(self._seed, f"texts.public.{round}")
        size = min(DRAWN, len(self._prompts))
        self._drawn = rng.choice(self._prompts, size, replace=False).tolist()
        if self._words:
            return
        places = np.concatenate([self._pupils[0].numbers[row] for row in self._drawn])
        bare = first_bank(self._seed)
        trained = [
            self._pupils[k].say(b, self._drawn) for k, b in zip(self._kinds, banks, strict=True)
        ]
        untrained = (
            [pupil.say(bare, self._drawn) for pupil in self._pupils]
            if self._voices == "untrained"
            else []
        )
        for group, targets in self._targets.items():
            said = [
                own if self._voices == "all" or kind == group else untrained[kind]
                for own, kind in zip(trained, self._kinds, strict=True)
                if self._voices != "type" or kind == group
            ]
            targets.hear(places, said)

    def term(self, client: int, round: int) -> Term:
        """The loss on what was said last."""
        kind = self._kinds[client]
        targets = self._targets[0 if self._voices == "all" else kind]
        order = Order(self._drawn, generator(self._seed, f"texts.lessons.{round}.{client}"))
        pupil = self._pupils[kind]
        return lambda bank: pupil.loss(bank, targets, order.draw(LESSON))


# ------------------------------------------------------------------------------------ what came of it


def by_text(corpus: Corpus, losses: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums of losses and numbers of tokens, text by text."""
    owners = corpus.owners(range(len(corpus)))
    sums = torch.zeros(len(corpus), dtype=torch.float64).index_add_(0, owners, losses.double())
    return sums.numpy(), torch.bincount(owners, minlength=len(corpus)).numpy()


def bare(world: World, holder: Holder, part: str) -> dict[str, Any]:
    """What :func:`measured` says, of the client's bare model."""
    corpus = _corpus(world, holder, part)
    return _told(world, holder, part, by_text(corpus, -corpus.target_logs())[0])


def measured(
    bank: Bank, world: World, holder: Holder, part: str, sums: TokenSums | None = None
) -> dict[str, Any]:
    """Loss per answer token of a client on all tasks and on its own (by its shares), and by task.

    ``behind_bare``: mean and standard error of the loss minus the bare model's, over the texts of its own tasks.
    """
    view, corpus = world.views[holder.kind], _corpus(world, holder, part)
    losses = test_losses(bank, view, corpus) if sums is None else sums.losses(bank, holder, part)
    found, sizes = by_text(corpus, losses)
    before, _ = by_text(corpus, -corpus.target_logs())
    own = np.flatnonzero(holder.shares[world.task_of[part]] > 0)
    behind = (found[own] - before[own]) / sizes[own]
    error = behind.std(ddof=1) / len(own) ** 0.5
    told = _told(world, holder, part, found) | {
        "behind_bare": [round(float(behind.mean()), 5), round(float(error), 5)],
        "own_texts": len(own),
    }
    return told if sums is None else told | {"weight": sums.weight}


def _corpus(world: World, holder: Holder, part: str) -> Corpus:
    view = world.views[holder.kind]
    return {"dev": view.dev, "test": view.test}[part]


def _told(world: World, holder: Holder, part: str, found: NDArray[np.float64]) -> dict[str, Any]:
    sizes = np.diff(_corpus(world, holder, part).starts)
    tasks = world.task_of[part]
    by_task = [
        float(found[tasks == task].sum() / sizes[tasks == task].sum())
        for task in range(len(world.task_names))
    ]
    return {
        "type": world.names[holder.kind],
        "all": round(float(found.sum() / sizes.sum()), 5),
        "own": round(float(np.dot(holder.shares, by_task)), 5),
        "tasks": [round(value, 4) for value in by_task],
    }
