"""What the laboratory knows of a claim's task: texts, clients, states, and maps made on its public texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.science.laboratory.clients import LatentTask, latent_task
from benchmarks.science.laboratory.rows import ALIGNMENT, METHOD
from benchmarks.science.laboratory.states import (
    Array,
    kept_label_rows,
    kept_states,
    type_key,
)
from benchmarks.science.tasks import PARTS, data_of, folder_of
from heterotune_flwr.alignment.factors import principal_components
from heterotune_flwr.alignment.maps import compute_maps
from heterotune_flwr.data.partition import client_examples


@dataclass(frozen=True)
class Owned:
    """Places, among a task's texts, of what one client trains on and of its own test."""

    train: list[int]
    own_test: list[int]


@functools.cache
def claim_task(name: str) -> ClaimTask:
    """A task, read once."""
    return ClaimTask(name)


class ClaimTask:
    """A task of :mod:`benchmarks.science.tasks`; its texts are those of train, dev and test, one after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        folder = folder_of(name)
        self._rows = {
            part: [json.loads(line) for line in (folder / f"{part}.jsonl").open()] for part in PARTS
        }
        self.parts = {part: [row["text"] for row in rows] for part, rows in self._rows.items()}
        self.public = self.parts["public"]
        self.texts = [text for part in PARTS[:3] for text in self.parts[part]]
        said = [row["label"] for part in PARTS[:3] for row in self._rows[part]]
        self.labels = sorted(set(said))
        self.targets = torch.tensor([self.labels.index(label) for label in said])
        self._latent: dict[tuple[str, ...], list[LatentTask]] = {}

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {text: place for place, text in enumerate(self.texts)}

    def places(self, part: str) -> slice:
        """Where a part's texts are among all."""
        start = sum(len(self.parts[name]) for name in PARTS[: PARTS.index(part)])
        return slice(start, start + len(self.parts[part]))

    def clients(self, count: int, seed: int) -> list[Owned]:
        """What ``count`` clients hold, as the product deals it."""
        data, found = data_of(self.name, "test", count), []
        for number in range(count):
            own = client_examples(data, number, count, seed)
            parts = (
                [self._places[e.text] for e in part] for part in (own.train, own.personal_test)
            )
            found.append(Owned(*parts))
        return found

    def states(self, spec: str, view: str = "") -> tuple[Array, Array]:
        """States of a type on all texts, and on the public ones (rows x d)."""
        kept = kept_states(spec, self.parts, data_of(self.name, "test", 1), view)
        return np.concatenate([kept[part] for part in PARTS[:3]]), kept["public"]

    def latent_tasks(self, specs: Sequence[str]) -> list[LatentTask]:
        """All texts as every type sees them through the product's maps, made on the public texts once."""
        if (known := self._latent.get(tuple(specs))) is not None:
            return known
        factors, states, rows = {}, [], []
        for spec in specs:
            states.append(self.states(spec))
            rows.append(kept_label_rows(spec, self.labels, data_of(self.name, "test", 1)))
            components = principal_components(states[-1][1], ALIGNMENT.components)
            own: dict[str, NDArray[np.float64]] = {
                f"slots.0.{name}": value
                for name, value in zip(("scores", "basis", "mean"), components, strict=True)
            }
            factors[type_key(spec)] = {**own, "label_rows": rows[-1]}
        maps = compute_maps(factors, ALIGNMENT, METHOD, self.labels, 0).maps
        found = [
            latent_task(maps[type_key(spec)], head, texts, texts, public)
            for spec, head, (texts, public) in zip(specs, rows, states, strict=True)
        ]
        self._latent[tuple(specs)] = found
        return found
