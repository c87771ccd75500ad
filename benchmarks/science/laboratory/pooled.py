"""The ceiling: one bank trained on everybody's examples, with a client's adapter, steps and rates.

*Pooled data*: every example is read by the model that is tested. *Pooled latents*: each by its owner's, through the
maps; what aligned models could learn together if nothing else kept them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.science.laboratory.clients import Adam, LatentTask, Schedule, initial_bank, mixture
from benchmarks.science.laboratory.federation import log_priors
from heterotune_flwr.schema import MethodConfig


@dataclass(frozen=True)
class Pool:
    """Examples of some runs: places among the task's texts, and the type that reads each (both runs x examples)."""

    places: Tensor
    readers: Tensor


def train_pooled(
    tasks: Sequence[LatentTask], targets: Tensor, pool: Pool, rates: Tensor, seeds: Sequence[int],
    method: MethodConfig, schedule: Schedule,
) -> dict[str, Tensor]:  # fmt: skip
    """Banks (runs first) after ``schedule.rounds`` times its steps; ``rates`` and ``seeds`` are one per run."""
    z = torch.stack([task.pool_z for task in tasks])
    logits = torch.stack([task.pool_logits for task in tasks])
    effects = torch.stack([task.effect.T for task in tasks])
    wanted = targets[pool.places]
    prior = log_priors(wanted, logits.shape[-1], schedule)[:, None]
    firsts = {seed: initial_bank(method, effects.shape[1], seed) for seed in set(seeds)}
    bank = {key: torch.stack([firsts[seed][key] for seed in seeds]) for key in firsts[seeds[0]]}
    rng, runs = torch.Generator().manual_seed(0), torch.arange(len(rates))[:, None]
    examples = wanted.shape[1]
    size = min(schedule.batch, examples)
    repeats = -(-schedule.steps * size // examples)
    for _ in range(schedule.rounds):
        adam = Adam(bank, schedule, rates)
        order = torch.rand(len(rates), repeats, examples, generator=rng).argsort(-1).flatten(1)
        for step in range(schedule.steps):
            batch = order[:, step * size : (step + 1) * size]
            places, readers = pool.places[runs, batch], pool.readers[runs, batch]
            leaves = {key: value.requires_grad_(True) for key, value in bank.items()}
            out = mixture(leaves, z[readers, places])
            said = logits[readers, places] + torch.einsum("nbo,nboc->nbc", out, effects[readers])
            loss = functional.cross_entropy(
                (said + prior).flatten(0, 1), wanted[runs, batch].flatten(), reduction="sum"
            )
            grads = torch.autograd.grad(loss / size, list(leaves.values()))
            bank = {key: value.detach() for key, value in bank.items()}
            adam.step(bank, dict(zip(bank, grads, strict=True)))
    return bank
