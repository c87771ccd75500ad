"""Token distributions on public answers: what a client says, how it travels, and what all say together.

At every position where the types' tokenizers stand one to one a client tells its eight likeliest symbols, with a byte
of log-probability and two of number each. The mean weighs each client by exp(-entropy), and moves: a prompt's target is
half what it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Symbols told per position.
TOP = 8
#: Log-probabilities travel in steps of a sixteenth of a nat, down to -15.9.
_STEPS = 16


@dataclass(frozen=True)
class Told:
    """Symbols and their probabilities at n positions: ``numbers`` n x k, ``shares`` n x k (0: nothing told)."""

    numbers: NDArray[np.int64]
    shares: NDArray[np.float64]

    @property
    def entropy(self) -> NDArray[np.float64]:
        """Entropy in nats at every position; what is not told counts as one more symbol."""
        known = np.concatenate([self.shares, 1 - self.shares.sum(1, keepdims=True)], axis=1)
        known = np.clip(known, 1e-12, 1.0)
        entropy: NDArray[np.float64] = -(known * np.log(known)).sum(1)
        return entropy


def pack(logs: Tensor, numbers: Tensor) -> bytes:
    """Bytes of a client's likeliest symbols (both n x 8): 24 a position."""
    steps = (-_STEPS * logs).round().clamp(0, 255).to(torch.uint8).numpy()
    return steps.tobytes() + numbers.numpy().astype("<u2").tobytes()


def unpack(data: bytes, top: int = TOP) -> Told:
    """The inverse of :func:`pack`, as probabilities that add up to at most 1."""
    count = len(data) // (3 * top)
    steps = np.frombuffer(data, np.uint8, count * top).reshape(count, top)
    numbers = np.frombuffer(data, "<u2", offset=count * top).reshape(count, top)
    shares = np.exp(-steps.astype(np.float64) / _STEPS)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1.0)
    return Told(numbers.astype(np.int64), shares)


def average(
    said: Sequence[Told], weights: NDArray[np.float64] | None = None, top: int = TOP
) -> Told:
    """The ``top`` likeliest symbols of the clients' mean; weights exp(-entropy), or given (clients x n)."""
    if weights is None:
        weights = np.exp(-np.stack([own.entropy for own in said]))
    weights = weights / weights.sum(0)
    numbers = np.concatenate([own.numbers for own in said], axis=1)
    shares = np.concatenate(
        [own.shares * weight[:, None] for own, weight in zip(said, weights, strict=True)], axis=1
    )
    order = np.argsort(numbers, axis=1, kind="stable")
    numbers = np.take_along_axis(numbers, order, 1)
    shares = np.take_along_axis(shares, order, 1)
    # A symbol that several name is gathered in the first place that has it.
    first = np.concatenate([np.ones((len(numbers), 1), bool), numbers[:, 1:] != numbers[:, :-1]], 1)
    group = first.cumsum(1) - 1
    summed = np.zeros_like(shares)
    np.add.at(summed, (np.arange(len(shares))[:, None], group), shares)
    names = np.zeros_like(numbers)
    names[np.arange(len(numbers))[:, None], group] = numbers
    best = np.argsort(-summed, axis=1, kind="stable")[:, :top]
    return Told(np.take_along_axis(names, best, 1), np.take_along_axis(summed, best, 1))


class Targets:
    """What is taught about every public position, as it stands; ``count`` positions in all."""

    def __init__(self, count: int) -> None:
        self.numbers = np.zeros((count, TOP), np.int64)
        self.shares = np.zeros((count, TOP))

    def hear(self, places: NDArray[np.int64], said: Sequence[Told]) -> None:
        """Take up what clients said about some positions: half of it, where something was said before."""
        mean = average(said)
        known = self.shares[places].sum(1) > 0
        before = Told(self.numbers[places], self.shares[places])
        weights = np.stack([np.where(known, 0.5, 0.0), np.where(known, 0.5, 1.0)])
        moved = average([before, mean], weights)
        self.numbers[places], self.shares[places] = moved.numbers, moved.shares

    def at(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Symbols (n x 8) and shares that add up to 1 at some positions."""
        shares = self.shares[places]
        shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-12)
        return torch.from_numpy(self.numbers[places]), torch.from_numpy(shares).float()
