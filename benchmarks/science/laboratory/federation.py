"""Federated training of the last slot in the latent space: all clients of all seeds at once.

With frozen maps and label-word loss the backbone's width disappears: an example is its latents ``z = D x + o`` and
its label words' own logits, an output latent moves them by ``W_labels U``. So a whole table (several
seeds, several strategies) is a few batched matrix products per step, and the numbers are those of the product's
DeMA layer, optimizer and clipping (tests/benchmarks/test_laboratory.py compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.science.laboratory.chains import ChainServers, Clients
from benchmarks.science.laboratory.clients import Adam, LatentTask, Schedule, initial_bank, mixture
from benchmarks.science.laboratory.consensus import OPTIONS, Lessons
from heterotune_flwr.rates import sinking_share
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.strategies.guests import RATE_SHARE

SHARINGS = ("alone", "within", "across")
#: (banks, tasks of the types, type of every client, right labels) -> clients x whatever is measured
Measure = Callable[[Mapping[str, Tensor], list[LatentTask], Tensor, Tensor], NDArray[Any]]


def _averaged(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the rows of each group, given back to every row."""
    count = int(groups.max()) + 1
    total = torch.zeros(count, *values.shape[1:]).index_add_(0, groups, values)
    size = torch.bincount(groups, minlength=count).reshape(-1, *[1] * (values.dim() - 1))
    return (total / size)[groups]


def _group_ids(*columns: Tensor) -> Tensor:
    """Number the distinct rows of some columns."""
    return torch.unique(torch.stack(columns, 1), dim=0, return_inverse=True)[1]


@dataclass(frozen=True)
class Groups:
    """Who averages with whom: ids per client for its type's mean, the bank's and the gate's."""

    within: Tensor
    bank: Tensor
    gate: Tensor

    @classmethod
    def of(cls, sharing: Tensor, runs: Tensor, types: Tensor, gate_scope: str) -> Groups:
        """``sharing`` holds indices into :data:`SHARINGS`, one per client."""
        own = torch.arange(len(runs))
        alone, across = sharing == 0, sharing == 2
        client = torch.where(alone, own, -1)
        within = _group_ids(sharing, runs, types, client)
        bank = _group_ids(sharing, runs, torch.where(across, -1, types), client)
        gate = {"global": bank, "type": within, "client": own}[gate_scope]
        return cls(within, bank, gate)


def _scaled(values: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    return {k: v * factor.reshape(-1, *[1] * (v.dim() - 1)) for k, v in values.items()}


@torch.no_grad()
def aggregate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], groups: Groups
) -> dict[str, Tensor]:
    """The plain mean's step: experts inside a type, then over the bank's group; gates over theirs."""
    step = {}
    for key in end:
        delta = end[key] - start[key]
        if key.startswith("gate"):
            step[key] = _averaged(delta, groups.gate)
        else:
            step[key] = _averaged(_averaged(delta, groups.within), groups.bank)
    return {key: start[key] + step[key] for key in end}


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in some clients (their indices in a run), in training alone.

    ``shuffled``: labels in random order; ``wrong``: every label replaced by the next one; ``loud``: updates ten times
    as long.
    """

    kind: str
    clients: Sequence[int]

    def _strikes(self, places: Tensor) -> Tensor:
        return torch.isin(places, torch.tensor(list(self.clients)))

    def labels(self, wanted: Tensor, places: Tensor, count: int) -> Tensor:
        """The labels clients train on (N x P); ``places``: their indices in their runs."""
        if self.kind == "loud":
            return wanted
        changed = (wanted + 1) % count
        if self.kind == "shuffled":
            order = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
            changed = wanted.gather(1, order)
        return torch.where(self._strikes(places)[:, None], changed, wanted)

    def updates(
        self, start: Mapping[str, Tensor], end: dict[str, Tensor], places: Tensor
    ) -> dict[str, Tensor]:
        """What clients send."""
        if self.kind != "loud":
            return end
        factor = torch.where(self._strikes(places), 10.0, 1.0)
        longer = _scaled({k: end[k] - start[k] for k in end}, factor)
        return {key: start[key] + longer[key] for key in end}


@dataclass
class _Fleet:
    """All clients of all runs, learning rates and sharings, one row each."""

    tasks: Sequence[LatentTask]
    schedule: Schedule
    types: Tensor
    places: Tensor  # of every client in its run
    runs: Tensor
    across: Tensor
    rate: Tensor
    groups: Groups
    z: Tensor
    logits: Tensor
    wanted: Tensor
    effect: Tensor
    orders: int  # clients with batches of their own; the others repeat them
    lessons: Lessons | None = None
    personalized: bool = False

    def learners(self, bank: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows that share across types."""
        return {key: value[self.across] for key, value in bank.items()}

    def train(self, bank: dict[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        """One round's local steps of everybody."""
        adam, steps = Adam(bank, self.schedule, self.rate), self.schedule.steps
        total, examples = self.wanted.shape
        size = min(self.schedule.batch, examples)
        rows = torch.arange(total)[:, None]
        drawn = torch.rand(self.orders, -(-steps * size // examples), examples, generator=rng)
        order = drawn.argsort(-1).flatten(1).repeat(total // self.orders, 1)
        for step in range(steps):
            batch = order[:, step * size : (step + 1) * size]
            leaves = {key: value.requires_grad_(True) for key, value in bank.items()}
            out = torch.bmm(mixture(leaves, self.z[rows, batch]), self.effect)
            losses = functional.cross_entropy(
                (self.logits[rows, batch] + out).flatten(0, 1),
                self.wanted[rows, batch].flatten(),
                reduction="sum",
            )
            losses = losses / size
            if self.personalized and self.lessons is not None:
                losses = losses + self.lessons.loss(self.learners(leaves))
            grads = torch.autograd.grad(losses, list(leaves.values()))
            bank = {key: value.detach() for key, value in bank.items()}
            adam.step(bank, dict(zip(bank, grads, strict=True)))
        return bank


class _Guests:
    """Backbones without data: they take the mean of the types' banks and fit the consensus on all anchors."""

    def __init__(self, fleet: _Fleet, count: int, guests: int, members: int) -> None:
        self.fleet, self.guests = fleet, guests
        # one run of ``count`` at a time, in the order the rows that share across types have
        self.runs = torch.arange(count).repeat_interleave(guests)
        self.kinds = members + torch.arange(guests).repeat(count)
        self.teachers = fleet.across.nonzero().flatten().reshape(count, -1)
        self.bank: dict[str, Tensor] = {}

    def learn(self, bank: Mapping[str, Tensor]) -> None:
        """Take the bank of every run and, where there is a consensus, fit it."""
        self.bank = {
            key: value[self.teachers].mean(1).repeat_interleave(self.guests, 0)
            for key, value in bank.items()
        }
        lessons, fleet = self.fleet.lessons, self.fleet
        if lessons is None:
            return
        rates = RATE_SHARE * fleet.rate[self.teachers[:, 0]].repeat_interleave(self.guests)
        adam, steps = Adam(self.bank, fleet.schedule, rates), OPTIONS.guest_steps
        for step in range(steps):
            adam.rates = rates * sinking_share(step / steps)
            leaves = {key: value.requires_grad_(True) for key, value in self.bank.items()}
            grads = torch.autograd.grad(
                lessons.loss(leaves, self.kinds, self.runs), list(leaves.values())
            )
            self.bank = {key: value.detach() for key, value in self.bank.items()}
            adam.step(self.bank, dict(zip(self.bank, grads, strict=True)))


def _fleet(
    tasks: list[LatentTask], targets: tuple[Tensor, Tensor], shares: list[list[int]], clients: int,
    schedule: Schedule, sharings: tuple[str, ...], trouble: Trouble | None,
) -> _Fleet:  # fmt: skip
    rates = torch.tensor(schedule.rates)
    each = len(shares) * len(rates)
    sharing = torch.tensor([SHARINGS.index(name) for name in sharings]).repeat_interleave(each)
    copies = len(rates) * len(sharings)
    places = (torch.arange(each) % clients).repeat(len(sharings))
    types = places % len(tasks)
    runs = (torch.arange(each) // clients).repeat(len(sharings))
    chosen = torch.tensor(shares).repeat(copies, 1)
    kinds = types.tolist()
    z = torch.stack([tasks[k].pool_z[rows] for k, rows in zip(kinds, chosen, strict=True)])
    logits = torch.stack(
        [tasks[k].pool_logits[rows] for k, rows in zip(kinds, chosen, strict=True)]
    )
    wanted = targets[0][chosen]
    if trouble is not None:
        wanted = trouble.labels(wanted, places, logits.shape[-1])
    return _Fleet(
        tasks=tasks,
        schedule=schedule,
        types=types,
        places=places,
        runs=runs,
        across=sharing == SHARINGS.index("across"),
        rate=rates.repeat_interleave(len(shares)).repeat(len(sharings)),
        groups=Groups.of(sharing, runs, types, schedule.gate_scope),
        z=z,
        logits=logits + log_priors(wanted, logits.shape[-1], schedule)[:, None],
        wanted=wanted,
        effect=torch.stack([tasks[k].effect for k in kinds]).transpose(1, 2),
        orders=len(shares),
    )


def federate(
    tasks: list[LatentTask], targets: tuple[Tensor, Tensor], shares: list[list[int]],
    clients: int, seeds: list[int], method: MethodConfig, schedule: Schedule,
    sharings: tuple[str, ...] = SHARINGS, guests: Sequence[LatentTask] = (),
    trouble: Trouble | None = None, measure: Measure | None = None, servers: ChainServers | None = None,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Accuracy (sharing -> rates x seeds x clients, percent) on the global test after the last round.

    ``measure``: another measure of every client, :func:`hits` for instance, whose further axes follow the clients'.

    ``guests`` are backbones that take no part: ``guests`` -> rates x seeds x guests is what they reach with the bank
    that is shared across types, and their own maps (and, where there is a type phase, after fitting what those who take
    part predict after the last round). ``trouble`` strikes some clients. ``servers`` combine; those of the schedule's
    rule where none are given.

    Client ``i`` of a run is of type ``i mod len(tasks)``, as in the product's simulation. Clients see the
    same batches whatever is shared and however fast they learn: differences are paired.
    """
    clones = len(schedule.rates)
    fleet = _fleet(tasks, targets, shares, clients, schedule, sharings, trouble)
    groups, runs, types = fleet.groups, fleet.runs, fleet.types
    firsts = [initial_bank(method, tasks[0].effect.shape[1], seed) for seed in seeds]
    bank = {k: torch.stack([firsts[int(r) % len(seeds)][k] for r in runs]) for k in firsts[0]}
    shared = schedule.rounds - int(schedule.personalization_phase * schedule.rounds)
    everyone = [*tasks, *guests]
    if shared < schedule.rounds:
        fleet.lessons = Lessons(everyone, types[fleet.across], runs[fleet.across])
    waiting = _Guests(fleet, clones * len(seeds), len(guests), len(tasks)) if guests else None
    rng = torch.Generator().manual_seed(0)
    if servers is None and schedule.rule != "mean":
        servers = ChainServers(schedule.rule, schedule.gate_scope == "global")
    for round in range(1, schedule.rounds + 1):
        if round == shared + 1:
            fleet.personalized = True
            groups = Groups(groups.within, groups.within, groups.within)
        start = {key: value.clone() for key, value in bank.items()}
        bank = fleet.train(bank, rng)
        if trouble is not None:
            bank = trouble.updates(start, bank, fleet.places)
        if fleet.lessons is not None and round >= shared:
            last = waiting is not None and round == schedule.rounds
            fleet.lessons.aggregate(fleet.learners(bank), everything=last)
        plain = aggregate(start, bank, groups)
        if servers is not None and not fleet.personalized:
            length = fleet.rate * schedule.steps
            bank = servers.step(start, bank, plain, Clients(fleet.across, runs, types, length))
        else:
            bank = plain
    if waiting is not None:
        waiting.learn(bank)
    found = (measure or accuracies)(bank, everyone, types, targets[1])
    parts = found.reshape(len(sharings), clones, len(seeds), clients, *found.shape[1:])
    result = dict(zip(sharings, parts, strict=True))
    if waiting is not None:
        reached = accuracies(waiting.bank, everyone, waiting.kinds, targets[1])
        result["guests"] = reached.reshape(-1, len(seeds), waiting.guests)
    return result


def log_priors(wanted: Tensor, labels: int, schedule: Schedule) -> Tensor:
    """Scaled log label frequencies of every client (N x C)."""
    counts = functional.one_hot(wanted, labels).sum(1) + schedule.smoothing
    return schedule.adjustment * torch.log(counts / counts.sum(1, keepdim=True))


def accuracies(
    bank: Mapping[str, Tensor], tasks: list[LatentTask], types: Tensor, wanted: Tensor
) -> NDArray[np.float64]:
    """Percent of the test texts that every client's bank has right."""
    return 100 * hits(bank, tasks, types, wanted).mean(axis=1)


@torch.no_grad()
def hits(
    bank: Mapping[str, Tensor], tasks: list[LatentTask], types: Tensor, wanted: Tensor
) -> NDArray[np.bool_]:
    """Which test texts (clients x texts) every client's bank has right."""
    found = []
    for i, kind in enumerate(types.tolist()):
        own, task = {key: value[i : i + 1] for key, value in bank.items()}, tasks[kind]
        out = task.test_logits + (mixture(own, task.test_z[None]) @ task.effect.T)[0]
        found.append((out.argmax(-1) == wanted).numpy())
    return np.stack(found)


def zero_shot(tasks: list[LatentTask], wanted: Tensor) -> list[float]:
    """Accuracy of every bare backbone (percent)."""
    return [100 * (t.test_logits.argmax(-1) == wanted).double().mean().item() for t in tasks]
