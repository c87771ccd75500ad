"""Pooled token sums: what latents are like where a symbol is right, added up over all clients in closed form.

``g_v(z) = (m_v - m)' M (z - (m_v + m)/2)`` with ``m_v = (s_v + k m)/(n_v + k)`` is added to the symbol's logit at the
first answer positions, by a weight that each client chooses by the loss on its held-out texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.science.laboratory.text_clients import Bank, outputs, test_losses
from benchmarks.science.laboratory.text_deal import Holder
from benchmarks.science.laboratory.text_losses import moments
from benchmarks.science.laboratory.text_world import Corpus, View, World

#: Answer positions that count, symbols at most, clients that must have used one.
_FIRST, _MOST, _CLIENTS = 4, 256, 2
#: k, as for labels.
_PRIOR = 2.0
#: Tried by every client; 0 is no sums.
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0)


def _first(corpus: Corpus, rows: Sequence[int]) -> Tensor:
    """The first answer positions of some rows."""
    parts = [
        torch.arange(corpus.starts[i], min(corpus.starts[i] + _FIRST, corpus.starts[i + 1]))
        for i in rows
    ]
    return torch.cat(parts)


class TokenSums:
    """What all clients' sums make of latents. ``weight`` is what the client asked last has chosen."""

    def __init__(self, world: World, holders: Sequence[Holder]) -> None:
        self._world, self.weight = world, 0.0
        public = torch.cat([corpus.z for corpus in world.public["bare"].corpora])
        self._m = world.correlation / public.var(0).clamp(min=1e-6)
        counts: dict[int, int] = {}
        sums: dict[int, Tensor] = {}
        users: dict[int, set[int]] = {}
        everything: list[Tensor] = []
        for number, holder in enumerate(holders):
            view = world.views[holder.kind]
            symbol = _symbol_of(view, int(view.effect.shape[0]))
            places = _first(view.train, holder.rows)
            z, names = view.train.z[places], symbol[view.train.targets[places]]
            everything.append(z)
            for name in names[names >= 0].unique().tolist():
                own = z[names == name]
                counts[name] = counts.get(name, 0) + len(own)
                sums[name] = own.sum(0) + sums.get(name, 0.0)
                users.setdefault(name, set()).add(number)
        known = [name for name in counts if len(users[name]) >= min(_CLIENTS, len(holders))]
        self._names = sorted(known, key=lambda name: (-counts[name], name))[:_MOST]
        mean = torch.cat(everything).mean(0)
        n = torch.tensor([float(counts[name]) for name in self._names])[:, None]
        s = torch.stack([sums[name] for name in self._names])
        self._mean, self._means = mean, (s + _PRIOR * mean) / (n + _PRIOR)

    def scores(self, z: Tensor) -> Tensor:
        """Scores ``g`` of every symbol that has one (n x names)."""
        away = (self._means - self._mean) * self._m
        middle = (self._means + self._mean) / 2
        return z @ away.T - (away * middle).sum(1)

    def losses(self, bank: Bank, holder: Holder, part: str) -> Tensor:
        """Losses of a corpus at the weight that is best on the client's own held-out texts."""
        view = self._world.views[holder.kind]
        own = [i for i, t in enumerate(self._world.task_of["dev"]) if holder.shares[t] > 0]
        held, dev = view.dev.places(own), self._moved(bank, view, view.dev)
        by_weight = {weight: dev(weight)[held].mean().item() for weight in WEIGHTS}
        self.weight = min(by_weight, key=lambda weight: by_weight[weight])
        return self._moved(bank, view, {"dev": view.dev, "test": view.test}[part])(self.weight)

    @torch.no_grad()
    def _moved(self, bank: Bank, view: View, corpus: Corpus) -> Callable[[float], Tensor]:
        """The losses as a function of the weight."""
        losses, ids = test_losses(bank, view, corpus), view.tokens[self._names]
        first = _first(corpus, range(len(corpus)))
        before, scores = [], []
        for places in first.split(128):
            z, base = corpus.z[places], corpus.base(places)
            moved = outputs(bank, z)
            normaliser, _ = moments(base, moved, view.whole)
            before.append(base[:, ids].float() + moved @ view.whole[ids].T - normaliser[:, None])
            scores.append(self.scores(z))
        logs, change = torch.cat(before), torch.cat(scores)
        right = corpus.targets[first][:, None] == ids

        def at(weight: float) -> Tensor:
            more = ((logs + weight * change).exp() - logs.exp()).sum(1)
            found = losses.clone()
            found[first] += torch.log1p(more) - weight * (change * right).sum(1)
            return found

        return at


def _symbol_of(view: View, size: int) -> Tensor:
    found = torch.full((size,), -1, dtype=torch.long)
    found[view.ids] = torch.arange(len(view.ids))
    return found
