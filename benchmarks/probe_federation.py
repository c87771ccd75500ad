"""Federated training of the last slot in the latent space: all clients of all seeds at once.

With frozen maps and label-word loss the backbone's width disappears: an example is its latents ``z = D x + o`` and
its label words' own logits, an output latent moves them by ``W_labels U``. So a whole table (several
seeds, several strategies) is a few batched matrix products per step, and the numbers are those of the product's
DeMA layer, optimizer and clipping (tests/test_alignment_probe.py compares them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.probe_chain import CHAINS, ChainServers, Clients
from heterotune_flwr.config.schema import DataConfig, MethodConfig
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors

SHARINGS = ("alone", "within", "across")


@dataclass(frozen=True)
class LatentTask:
    """One type's view of the task: latents and label logits of pool and test, effect of the outputs.

    ``pool_z`` P x r, ``pool_logits`` P x C, likewise ``test_*``; ``effect`` C x r_out = W_labels U.
    """

    pool_z: Tensor
    pool_logits: Tensor
    test_z: Tensor
    test_logits: Tensor
    effect: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long and how fast clients train, and how the server combines."""

    rounds: int = 30
    steps: int = 12
    batch: int = 16
    rates: tuple[float, ...] = (1e-3,)  # learning rates, all tried at once
    weight_decay: float = 0.0
    clip: float = 1.0
    adjustment: float = 1.0  # share of the client's own log label frequencies the loss discounts
    smoothing: float = 0.1
    rule: str = "mean"  # mean | equalised | the name of a chain in probe_chain
    gate_scope: str = "global"  # global | type | client


def latent_task(
    maps: Mapping[str, NDArray[np.float32]],
    label_rows: NDArray[np.float32],
    pool: NDArray[np.float32],
    test: NDArray[np.float32],
) -> LatentTask:
    """Push states through a type's last-slot maps (slot 0 of one)."""
    down = torch.from_numpy(maps["slots.0.map.down.weight"])
    offset = torch.from_numpy(maps["slots.0.map.down.bias"])
    rows, up = torch.from_numpy(label_rows), torch.from_numpy(maps["slots.0.map.up.weight"])
    p, t = torch.from_numpy(pool), torch.from_numpy(test)
    return LatentTask(p @ down.T + offset, p @ rows.T, t @ down.T + offset, t @ rows.T, rows @ up)


def draw_clients(
    data: DataConfig, clients: int, seeds: list[int], index: Mapping[str, int]
) -> list[list[int]]:
    """Pool indices of every client, seed by seed (the product's own partition)."""
    return [
        [index[e.text] for e in client_examples(data, i, clients, seed).train]
        for seed in seeds
        for i in range(clients)
    ]


def initial_bank(method: MethodConfig, output: int, seed: int) -> dict[str, Tensor]:
    """The product's first values, experts stacked: N (E x q x r), b, P (E x r_out x q), G, c."""
    values = initial_tensors(bank_shapes(method, output), seed)

    def stacked(what: str) -> Tensor:
        names = [f"slots.0.experts.global.{e}.{what}" for e in range(method.experts_global)]
        return torch.from_numpy(np.stack([values[name] for name in names]))

    return {
        "down": stacked("down.weight"), "bias": stacked("down.bias"), "up": stacked("up.weight"),
        "gate": torch.from_numpy(values["slots.0.gate.weight"]),
        "gate_bias": torch.from_numpy(values["slots.0.gate.bias"]),
    }  # fmt: skip


def mixture(bank: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Output latents (N x B x r_out) of N clients' banks on latents (N x B x r)."""
    count, experts, inner, rank = bank["down"].shape
    pre = torch.bmm(z, bank["down"].reshape(count, experts * inner, rank).transpose(1, 2))
    hidden = functional.silu(pre + bank["bias"].reshape(count, 1, -1))
    weights = torch.softmax(
        torch.bmm(z, bank["gate"].transpose(1, 2)) + bank["gate_bias"][:, None], -1
    )
    hidden = hidden.reshape(*z.shape[:2], experts, inner) * weights[..., None]
    joined = bank["up"].permute(0, 1, 3, 2).reshape(count, experts * inner, -1)
    return torch.bmm(hidden.reshape(*z.shape[:2], -1), joined)


class Adam:
    """AdamW and clipping per client, on tensors whose first axis is the client."""

    def __init__(self, bank: Mapping[str, Tensor], schedule: Schedule, rates: Tensor) -> None:
        self.schedule = schedule
        self.rates = rates  # one per client
        self.first = {k: torch.zeros_like(v) for k, v in bank.items()}
        self.second = {k: torch.zeros_like(v) for k, v in bank.items()}
        self.count = 0

    @torch.no_grad()
    def step(self, bank: dict[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        """One update in place."""
        self.count += 1
        norm = torch.stack([g.flatten(1).pow(2).sum(1) for g in grads.values()]).sum(0).sqrt()
        factor = (self.schedule.clip / (norm + 1e-6)).clamp(max=1.0)
        correction = (1 - 0.999**self.count) ** 0.5
        for key, value in bank.items():
            shape = (-1, *[1] * (value.dim() - 1))
            rates = self.rates.reshape(shape)
            grad = grads[key] * factor.reshape(shape)
            self.first[key].lerp_(grad, 0.1)
            self.second[key].lerp_(grad.square(), 0.001)
            value.mul_(1 - rates * self.schedule.weight_decay)
            size = self.second[key].sqrt() / correction + 1e-8
            value.sub_(rates / (1 - 0.9**self.count) * self.first[key] / size)


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


def _norms(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([v.flatten(1).pow(2).sum(1) for v in values.values()]).sum(0).sqrt()


def _scaled(values: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    return {k: v * factor.reshape(-1, *[1] * (v.dim() - 1)) for k, v in values.items()}


@torch.no_grad()
def aggregate(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], groups: Groups, schedule: Schedule,
    scale: dict[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The server's step; ``scale`` carries the running norms of the ``equalised`` rule."""
    deltas = {key: end[key] - start[key] for key in end}
    experts = {
        k: _averaged(v, groups.within) for k, v in deltas.items() if not k.startswith("gate")
    }
    mean = {k: _averaged(v, groups.bank) for k, v in experts.items()}
    if schedule.rule == "equalised":
        norm = _norms(experts)
        scale["norm"] = norm if "norm" not in scale else 0.9 * scale["norm"] + 0.1 * norm
        equal = _scaled(experts, 1 / scale["norm"].clamp(min=1e-12))
        equal = {k: _averaged(v, groups.bank) for k, v in equal.items()}
        mean = _scaled(equal, _norms(mean) / _norms(equal).clamp(min=1e-12))
    gates = {k: _averaged(v, groups.gate) for k, v in deltas.items() if k.startswith("gate")}
    return {key: start[key] + (mean | gates)[key] for key in end}


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in the clients of one type (its index), in training alone.

    ``shuffled``: labels in random order; ``wrong``: every label replaced by the next one; ``loud``: updates ten times
    as long.
    """

    kind: str
    type_index: int

    def labels(self, wanted: Tensor, types: Tensor, count: int) -> Tensor:
        """The labels clients train on (N x P)."""
        if self.kind == "loud":
            return wanted
        changed = (wanted + 1) % count
        if self.kind == "shuffled":
            order = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
            changed = wanted.gather(1, order)
        return torch.where((types == self.type_index)[:, None], changed, wanted)

    def updates(
        self, start: Mapping[str, Tensor], end: dict[str, Tensor], types: Tensor
    ) -> dict[str, Tensor]:
        """What clients send."""
        if self.kind != "loud":
            return end
        factor = torch.where(types == self.type_index, 10.0, 1.0)
        longer = _scaled({k: end[k] - start[k] for k in end}, factor)
        return {key: start[key] + longer[key] for key in end}


def federate(
    tasks: list[LatentTask], targets: tuple[Tensor, Tensor], shares: list[list[int]],
    clients: int, seeds: list[int], method: MethodConfig, schedule: Schedule,
    sharings: tuple[str, ...] = SHARINGS, guests: Sequence[LatentTask] = (),
    trouble: Trouble | None = None,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Accuracy (sharing -> rates x seeds x clients, percent) on the global test after the last round.

    ``guests`` are backbones that take no part: ``guests`` -> rates x seeds x guests is what they reach with the bank
    that is shared across types, and their own maps. ``trouble`` strikes one type.

    Client ``i`` of a run is of type ``i mod len(tasks)``, as in the product's simulation. Clients see the
    same batches whatever is shared and however fast they learn: differences are paired.
    """
    rates = torch.tensor(schedule.rates)
    clones = len(rates)
    each = len(shares) * clones
    kinds = [SHARINGS.index(name) for name in sharings]
    total = each * len(kinds)
    types = (torch.arange(each) % clients % len(tasks)).repeat(len(kinds))
    runs = (torch.arange(each) // clients).repeat(len(kinds))
    groups = Groups.of(
        torch.tensor(kinds).repeat_interleave(each), runs, types, schedule.gate_scope
    )
    rate = rates.repeat_interleave(len(shares)).repeat(len(kinds))
    chosen = torch.tensor(shares).repeat(len(kinds) * clones, 1)
    z = torch.stack([tasks[types[i]].pool_z[chosen[i]] for i in range(total)])
    logits = torch.stack([tasks[types[i]].pool_logits[chosen[i]] for i in range(total)])
    wanted = targets[0][chosen]
    if trouble is not None:
        wanted = trouble.labels(wanted, types, logits.shape[-1])
    logits = logits + _log_priors(wanted, logits.shape[-1], schedule)[:, None]
    effect = torch.stack([tasks[t].effect for t in types.tolist()]).transpose(1, 2)
    firsts = [initial_bank(method, tasks[0].effect.shape[1], seed) for seed in seeds]
    bank = {k: torch.stack([firsts[int(r) % len(seeds)][k] for r in runs]) for k in firsts[0]}
    rng = torch.Generator().manual_seed(0)
    rows = torch.arange(total)[:, None]
    size, scale = min(schedule.batch, chosen.shape[1]), {}
    servers = ChainServers(schedule.rule) if schedule.rule in CHAINS else ChainServers("mean chain")
    for _ in range(schedule.rounds):
        start = {key: value.clone() for key, value in bank.items()}
        adam = Adam(bank, schedule, rate)
        epochs = -(-schedule.steps * size // chosen.shape[1])
        drawn = torch.rand(len(shares), epochs, chosen.shape[1], generator=rng)
        order = drawn.argsort(-1).flatten(1).repeat(len(kinds) * clones, 1)
        for step in range(schedule.steps):
            batch = order[:, step * size : (step + 1) * size]
            leaves = {key: value.requires_grad_(True) for key, value in bank.items()}
            out = logits[rows, batch] + torch.bmm(mixture(leaves, z[rows, batch]), effect)
            losses = functional.cross_entropy(
                out.flatten(0, 1), wanted[rows, batch].flatten(), reduction="sum"
            )
            grads = torch.autograd.grad(losses / size, list(leaves.values()))
            bank = {key: value.detach() for key, value in bank.items()}
            adam.step(bank, dict(zip(bank, grads, strict=True)))
        if trouble is not None:
            bank = trouble.updates(start, bank, types)
        if schedule.rule in CHAINS:
            across = torch.tensor(kinds).repeat_interleave(each) == SHARINGS.index("across")
            plain = aggregate(start, bank, groups, schedule, scale)
            length = rate * schedule.steps
            bank = servers.step(start, bank, plain, Clients(across, runs, types, length))
        else:
            bank = aggregate(start, bank, groups, schedule, scale)
    found = _accuracies(bank, tasks, types, effect, targets[1])
    parts = found.reshape(len(kinds), clones, len(seeds), clients)
    result = dict(zip(sharings, parts, strict=True))
    if guests:
        first = torch.arange(clones * len(seeds)) * clients + sharings.index("across") * each
        shared = {key: value[first] for key, value in bank.items()}
        columns = [_guest(shared, guest, targets[1]) for guest in guests]
        result["guests"] = np.stack(columns, axis=1).reshape(clones, len(seeds), len(guests))
    return result


def _guest(bank: Mapping[str, Tensor], task: LatentTask, wanted: Tensor) -> NDArray[np.float64]:
    """Accuracy of a backbone with each of some banks (percent)."""
    count = len(bank["down"])
    effect = task.effect.T[None].repeat(count, 1, 1)
    return _accuracies(bank, [task], torch.zeros(count, dtype=torch.long), effect, wanted)


def _log_priors(wanted: Tensor, labels: int, schedule: Schedule) -> Tensor:
    """Scaled log label frequencies of every client (N x C)."""
    counts = functional.one_hot(wanted, labels).sum(1) + schedule.smoothing
    return schedule.adjustment * torch.log(counts / counts.sum(1, keepdim=True))


@torch.no_grad()
def _accuracies(
    bank: Mapping[str, Tensor],
    tasks: list[LatentTask],
    types: Tensor,
    effect: Tensor,
    wanted: Tensor,
) -> NDArray[np.float64]:
    found = []
    for i, kind in enumerate(types.tolist()):
        own = {key: value[i : i + 1] for key, value in bank.items()}
        out = tasks[kind].test_logits + (mixture(own, tasks[kind].test_z[None]) @ effect[i])[0]
        found.append(100 * (out.argmax(-1) == wanted).double().mean().item())
    return np.array(found)


def zero_shot(tasks: list[LatentTask], wanted: Tensor) -> list[float]:
    """Accuracy of every bare backbone (percent)."""
    return [100 * (t.test_logits.argmax(-1) == wanted).double().mean().item() for t in tasks]
