"""Which words of a vocabulary training looks at: those that are ever likely, and one place for all the others.

A quarter of a million words, of which most are never given a hundred-thousandth: training's softmax is over those that
some position gives more, the texts' own, and *the rest*, one word with their summed probability and mean effect. Tests
are over the whole vocabulary, so what this leaves out would show there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.science.laboratory.text_states import Answers

#: Log-probability that a word must reach somewhere.
LEAST = -9.0
_AT_A_TIME = 64


def ever_likely(lists: Sequence[Answers]) -> Tensor:
    """Which words (bool V) some position gives more than :data:`LEAST`, or stand in the texts."""
    least = np.full(lists[0].logs.shape[1], np.iinfo(np.uint16).max, np.uint16)
    for own in lists:
        # All are negative: as whole numbers, the least is the likeliest (and that is ten times as fast).
        np.minimum(least, own.logs.numpy().view(np.uint16).min(axis=0), out=least)
    found = torch.from_numpy(least.view(np.float16).astype(np.float32) > LEAST)
    for own in lists:
        found[own.targets] = True
    return found


@dataclass
class Words:
    """A type's words: ``ids`` of those looked at, ``place`` of every id (the last one for the rest)."""

    ids: Tensor
    place: Tensor
    rest: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Words:
        """Of a choice among all words (bool V)."""
        ids = chosen.nonzero().flatten()
        place = torch.full((len(chosen),), len(ids))
        place[ids] = torch.arange(len(ids))
        return cls(ids, place, torch.zeros(len(chosen)))

    def compact(self, answers: Answers) -> Answers:
        """The same answers on these words; what the rest is made of is remembered for :meth:`effect`."""
        logs = torch.empty(len(answers.targets), len(self.ids) + 1, dtype=torch.float16)
        for start in range(0, len(logs), _AT_A_TIME):
            part = answers.logs[start : start + _AT_A_TIME]
            chances = part.float().exp_()
            chances[:, self.ids] = 0.0
            self.rest += chances.sum(0)
            logs[start : start + _AT_A_TIME, :-1] = part[:, self.ids]
            logs[start : start + _AT_A_TIME, -1] = chances.sum(1).clamp(min=1e-7).log().half()
        return replace(answers, logs=logs, targets=self.place[answers.targets])

    def effect(self, effect: Tensor) -> Tensor:
        """Rows (words + 1) x r_out of the whole vocabulary's."""
        rest = (self.rest / self.rest.sum().clamp(min=1e-12)) @ effect
        return torch.cat([effect[self.ids], rest[None]])
