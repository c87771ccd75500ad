"""Cells of the headline's claims: every row is chosen on dev, texts and seeds, and measured on test.

A trial is a learning rate or another value of a row. A grid whose best value lies at its edge goes on there.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import Cells, machine, say
from benchmarks.science.headline_suites import CLAIM_SEEDS, SUITES

if TYPE_CHECKING:
    from benchmarks.science.laboratory.claim_rows import Field, LabRow

#: How far a grid goes on at its edges.
FURTHER = 3
AllCells = Mapping[str, Any]


def key(suite: str, row: str, trial: str, seed: int) -> str:
    """Name of one cell."""
    return f"{suite}|{row}|{trial}|{seed}"


def mean_accuracy(cell: Mapping[str, Any]) -> float:
    """Mean global accuracy over the clients: on dev for a dev seed, else on test."""
    return float(np.mean([client["global_accuracy"] for client in cell["clients"]]))


def accuracy_on_dev(cell: Mapping[str, Any]) -> float:
    """Mean accuracy, of a row that stops early after its best round."""
    return float(cell["best_accuracy"]) if "best_accuracy" in cell else mean_accuracy(cell)


def on_dev(suite: str, row: str, cells: AllCells) -> dict[str, float]:
    """Trial -> mean accuracy on dev, of the trials of which every dev seed is there."""
    seeds = SUITES[suite].sweep_of(row)
    start = f"{suite}|{row}|"
    trials = dict.fromkeys(n.split("|")[2] for n in cells if n.startswith(start))
    found = {}
    for trial in trials:
        dev = [cells.get(key(suite, row, trial, seed)) for seed in seeds]
        if all(dev):
            found[trial] = float(np.mean([accuracy_on_dev(cell) for cell in dev if cell]))
    return found


def chosen(suite: str, row: str, cells: AllCells) -> str | None:
    """The trial that is best on dev; None where none was measured."""
    found = on_dev(suite, row, cells)
    return max(found, key=lambda trial: found[trial]) if found else None


def beyond(values: Iterable[float], best: float, factor: float, grid: int) -> float | None:
    """The next value where the best lies at an edge of the tried ones, and the grid has not gone on too far."""
    tried = sorted(values)
    if len(tried) >= grid + FURTHER or best not in (tried[0], tried[-1]):
        return None
    return float(f"{best / factor if best == tried[0] else best * factor:g}")


def packed(right: NDArray[np.bool_]) -> str:
    """Which texts are right, as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpacked(told: str, texts: int) -> NDArray[np.bool_]:
    """The inverse of :func:`packed`."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(told), np.uint8))
    return bits[:texts].astype(bool)


def label_of(variant: str, value: float) -> str:
    """How a trial is called."""
    return f"{variant} {value:g}".strip()


def parsed(trial: str) -> tuple[str, float]:
    """The inverse of :func:`label_of`."""
    variant, _, value = trial.rpartition(" ")
    return variant, float(value)


def field_of(name: str) -> Field:
    """A suite as the laboratory has it."""
    from benchmarks.science.laboratory.claim_rows import Field
    from benchmarks.science.laboratory.claim_states import claim_task

    suite = SUITES[name]
    specs = [f"{backbone}@{bits}" for backbone, bits in suite.types]
    return Field(claim_task(suite.task), specs, specs[0], suite.clients)


class Grid(Protocol):
    """What a row tries: values, variants of which each tries all of them, and the factor by which a grid goes on."""

    values: tuple[float, ...]
    variants: tuple[str, ...]
    factor: float | None


class Trials(abc.ABC):
    """One row on one suite: its trials on dev, then the best one on test."""

    def __init__(self, suite: str, name: str, grid: Grid, cells: Cells) -> None:
        self.suite, self.name, self.grid, self.cells = suite, name, grid, cells

    @abc.abstractmethod
    def run(
        self, variant: str, values: Sequence[float], seeds: Sequence[int], part: str
    ) -> dict[str, Any]:
        """Cells of some values and seeds, measured on dev or test texts."""

    def measure(self) -> None:
        """Whatever is missing."""
        dev = SUITES[self.suite].sweep_of(self.name)
        for variant in self.grid.variants:
            self._complete(variant, self.grid.values, dev, "dev")
        while (further := self._further()) is not None:
            self._complete(further[0], [further[1]], dev, "dev")
        best = chosen(self.suite, self.name, self.cells.read())
        assert best is not None
        variant, value = parsed(best)
        self._complete(variant, [value], CLAIM_SEEDS, "test")

    def _further(self) -> tuple[str, float] | None:
        """The variant of the best trial, and the value by which its grid goes on."""
        if self.grid.factor is None:
            return None
        tried = on_dev(self.suite, self.name, self.cells.read())
        best, value = parsed(max(tried, key=lambda trial: tried[trial]))
        values = [number for variant, number in map(parsed, tried) if variant == best]
        following = beyond(values, value, self.grid.factor, len(self.grid.values))
        return None if following is None else (best, following)

    def _complete(
        self, variant: str, values: Sequence[float], seeds: Sequence[int], part: str
    ) -> None:
        known = self.cells.read()
        missing = [
            value
            for value in values
            if any(self.key(variant, value, seed) not in known for seed in seeds)
        ]
        if not missing:
            return
        new = self.run(variant, missing, seeds, part)
        self.cells.keep(new)
        for value in missing:
            own = [self.key(variant, value, seed) for seed in seeds]
            mean = 100 * float(np.mean([accuracy_on_dev(new[name]) for name in own if name in new]))
            say(f"{self.suite}, {self.name}, {label_of(variant, value)}: {mean:.1f} on {part}")

    def key(self, variant: str, value: float, seed: int) -> str:
        """Name of a cell of this row."""
        return key(self.suite, self.name, label_of(variant, value), seed)


class LabTrials(Trials):
    """A row without Flower, on kept states."""

    def __init__(self, suite: str, name: str, row: LabRow, field: Field, cells: Cells) -> None:
        super().__init__(suite, name, row, cells)
        self.row, self.field = row, field

    def run(
        self, variant: str, values: Sequence[float], seeds: Sequence[int], part: str
    ) -> dict[str, Any]:
        """See :class:`Trials`."""
        self.row.prepare(self.field)
        start = time.perf_counter()
        right = self.row.run(self.field, seeds, values, variant)
        seconds = round((time.perf_counter() - start) / len(seeds) / len(values), 2)
        up = self.row.bytes_up(self.field, variant) if self.row.bytes_up else None
        return {
            self.key(variant, value, seed): {
                "clients": self._clients(right[number, place], seed, part),
                "texts": len(self.field.task.parts[part]), "bytes_up_in_all": up, "seconds": seconds,
                "machine": machine(),
            }
            for number, value in enumerate(values) for place, seed in enumerate(seeds)
        }  # fmt: skip

    def _clients(self, right: NDArray[np.bool_], seed: int, part: str) -> list[dict[str, Any]]:
        held = self.field.task.places(part)
        found = []
        for number, own in enumerate(self.field.owned(seed)):
            told = right[number, held]
            client = {
                "client_id": f"client-{number:04d}", "type": self.field.specs[self.field.kinds[number]],
                "global_accuracy": float(told.mean()),
                "personal_accuracy": float(right[number, own.own_test].mean()),
            }  # fmt: skip
            found.append({**client, "hits": packed(told)} if part == "test" else client)
        return found
