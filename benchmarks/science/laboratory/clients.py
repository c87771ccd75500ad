"""Clients in the latent space: what they see, the bank they train, their optimizer.

With frozen maps and label-word loss the backbone's width disappears: an example is its latents ``z = D x + o`` and
its label words' own logits, an output latent moves them by ``W_labels U``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.schema import DataConfig, MethodConfig


@dataclass(frozen=True)
class LatentTask:
    """One type's view of the task: latents and label logits of pool and test, effect of the outputs.

    ``pool_z`` P x r, ``pool_logits`` P x C, likewise ``test_*`` and ``anchors_*``; ``effect`` C x r_out = W_labels U.
    """

    pool_z: Tensor
    pool_logits: Tensor
    test_z: Tensor
    test_logits: Tensor
    effect: Tensor
    anchors_z: Tensor
    anchors_logits: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long and how fast clients train, and how the server combines."""

    rounds: int = 30
    steps: int = 12
    batch: int = 16
    rates: tuple[float, ...] = (1e-3,)  # learning rates, all tried at once
    gate_rate: float = 0.1  # of the learning rate
    weight_decay: float = 0.0
    clip: float = 1.0
    adjustment: float = 1.0  # share of the client's own log label frequencies the loss discounts
    smoothing: float = 0.1
    rule: str = "mean"  # mean | the name of a chain in .chains
    gate_scope: str = "global"  # global | type | client
    personalization_phase: float = (
        0.0  # share of the rounds in which types go their own ways, taught by the consensus
    )


def latent_task(
    maps: Mapping[str, NDArray[np.float32]],
    label_rows: NDArray[np.float32],
    pool: NDArray[np.float32],
    test: NDArray[np.float32],
    anchors: NDArray[np.float32],
) -> LatentTask:
    """Push states through a type's last-slot maps (slot 0 of one)."""
    down = torch.from_numpy(maps["slots.0.map.down.weight"])
    offset = torch.from_numpy(maps["slots.0.map.down.bias"])
    rows, up = torch.from_numpy(label_rows), torch.from_numpy(maps["slots.0.map.up.weight"])
    p, t, a = torch.from_numpy(pool), torch.from_numpy(test), torch.from_numpy(anchors)
    return LatentTask(
        p @ down.T + offset, p @ rows.T, t @ down.T + offset, t @ rows.T, rows @ up,
        a @ down.T + offset, a @ rows.T,
    )  # fmt: skip


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
            if key.startswith("gate"):
                rates = rates * self.schedule.gate_rate
            grad = grads[key] * factor.reshape(shape)
            self.first[key].lerp_(grad, 0.1)
            self.second[key].lerp_(grad.square(), 0.001)
            value.mul_(1 - rates * self.schedule.weight_decay)
            size = self.second[key].sqrt() / correction + 1e-8
            value.sub_(rates / (1 - 0.9**self.count) * self.first[key] / size)
