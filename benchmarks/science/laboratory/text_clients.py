"""Training on answers of several tokens: the product's bank and AdamW on latents, the whole vocabulary's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.science.laboratory.clients import Adam, Schedule, initial_bank, mixture
from benchmarks.science.laboratory.text_consensus import TOP, Targets, Told, pack, unpack
from benchmarks.science.laboratory.text_losses import cross_entropy, likeliest
from benchmarks.science.laboratory.text_world import METHOD, Corpus, Public, View

Bank = dict[str, Tensor]
#: Adds up to the loss of one step.
Term = Callable[[Bank], Tensor]


class DivergedError(RuntimeError):
    """A loss is not finite: the rate is too high."""


def first_bank(seed: int) -> Bank:
    """The product's first values, with an axis of one client in front."""
    return {
        key: value[None] for key, value in initial_bank(METHOD, METHOD.output or 0, seed).items()
    }


def canonical(bank: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The bank by the product's names, as an adapter loads it."""
    one = {key: value[0].numpy() for key, value in bank.items()}
    named = {"slots.0.gate.weight": one["gate"], "slots.0.gate.bias": one["gate_bias"]}
    for number in range(METHOD.experts_global):
        expert = f"slots.0.experts.global.{number}"
        named[f"{expert}.down.weight"] = one["down"][number]
        named[f"{expert}.down.bias"] = one["bias"][number]
        named[f"{expert}.up.weight"] = one["up"][number]
    return named


def outputs(bank: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Output latents (n x r_out) of one client's bank."""
    return mixture(bank, z[None])[0]


def own_loss(bank: Bank, view: View, corpus: Corpus, rows: Sequence[int]) -> Tensor:
    """Mean loss over the answer tokens of some texts, as the product's ``Examples`` has it."""
    places = corpus.places(rows)
    moved = outputs(bank, corpus.z[places])
    return cross_entropy(moved, corpus.base(places), view.effect, corpus.targets[places]).mean()


class Order:
    """Draws rows as the product does: all once before any comes again, anew for every round."""

    def __init__(self, rows: Sequence[int], rng: np.random.Generator) -> None:
        self._rows, self._rng = np.asarray(rows), rng
        self._queue: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next ``count`` different rows."""
        size = min(count, len(self._rows))
        if len(self._queue) < size:
            rest = set(self._queue)
            self._queue += [
                i for i in self._rng.permutation(len(self._rows)).tolist() if i not in rest
            ]
        drawn, self._queue = self._queue[:size], self._queue[size:]
        return self._rows[drawn].tolist()


def train(bank: Bank, schedule: Schedule, terms: Sequence[Term]) -> Bank:
    """One round of one client: ``schedule.steps`` steps on the sum of the terms (each called once a step)."""
    adam = Adam(bank, schedule, torch.tensor(schedule.rates[:1]))
    bank = {key: value.clone() for key, value in bank.items()}
    for _ in range(schedule.steps):
        leaves = {key: value.requires_grad_(True) for key, value in bank.items()}
        loss = torch.stack([term(leaves) for term in terms]).sum()
        if not loss.isfinite():
            raise DivergedError(f"the loss is not finite at rate {schedule.rates[0]:g}")
        grads = torch.autograd.grad(loss, list(leaves.values()))
        bank = {key: value.detach() for key, value in bank.items()}
        adam.step(bank, dict(zip(bank, grads, strict=True)))
    return bank


# ------------------------------------------------------------------------------------ public answers


@dataclass(frozen=True)
class Pupil:
    """One type's side of public answers: where its positions lie in the targets, and what stands elsewhere."""

    view: View
    corpus: Corpus
    #: Per row: positions in the corpus that stand one to one, and their places in the targets.
    paired: Sequence[Tensor]
    numbers: Sequence[NDArray[np.int64]]
    #: Per row: positions where its text is trained on instead.
    alone: Sequence[Tensor]

    @classmethod
    def of(cls, view: View, public: Public, kind: int) -> Pupil:
        """The side of type number ``kind``."""
        corpus, paired, numbers, alone, count = public.corpora[kind], [], [], [], 0
        for row, pairs in enumerate(public.pairs):
            own = pairs[:, kind]
            paired.append(own)
            numbers.append(np.arange(count, count + len(own)))
            count += len(own)
            rest = np.setdiff1d(np.arange(corpus.starts[row], corpus.starts[row + 1]), own.numpy())
            alone.append(torch.from_numpy(rest if public.trainable else rest[:0]))
        return cls(view, corpus, paired, numbers, alone)

    def say(self, bank: Bank, rows: Sequence[int]) -> Told:
        """What the client's model says of some rows, after its way over the wire."""
        places = torch.cat([self.paired[row] for row in rows])
        moved = outputs(bank, self.corpus.z[places])
        base = self.corpus.base(places)
        return unpack(pack(*likeliest(moved, base, self.view.effect, self.view.ids, TOP)))

    def loss(self, bank: Bank, targets: Targets, rows: Sequence[int]) -> Tensor:
        """Mean over positions: cross-entropy to the targets one to one, to the text elsewhere."""
        places = torch.cat([self.paired[row] for row in rows])
        numbers, shares = targets.at(np.concatenate([self.numbers[row] for row in rows]))
        ids = self.view.ids[numbers]
        rest = torch.cat([self.alone[row] for row in rows])
        if len(rest):
            text = torch.zeros(len(rest), ids.shape[1], dtype=torch.long)
            text[:] = self.corpus.targets[rest][:, None]
            sure = torch.zeros(len(rest), ids.shape[1])
            sure[:, 0] = 1.0
            places = torch.cat([places, rest])
            ids, shares = torch.cat([ids, text]), torch.cat([shares, sure])
        moved = outputs(bank, self.corpus.z[places])
        return cross_entropy(moved, self.corpus.base(places), self.view.effect, ids, shares).mean()


# ------------------------------------------------------------------------------------ tests


@torch.no_grad()
def test_losses(bank: Bank, view: View, corpus: Corpus) -> Tensor:
    """Loss of every answer token of a dev or test corpus (S), over the whole vocabulary."""
    found = []
    for places in torch.arange(len(corpus.targets)).split(128):
        moved = outputs(bank, corpus.z[places])
        base = corpus.base(places)
        found.append(cross_entropy(moved, base, view.whole, corpus.targets[places]))
    return torch.cat(found)
