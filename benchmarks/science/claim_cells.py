"""Cells of the headline's claims: every row is chosen on dev, texts and seeds, and measured on test.

A trial is a learning rate or another value of a row. A grid whose best value lies at its edge goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import Cells, machine, say
from benchmarks.science.headline_suites import CLAIM_SEEDS, DEV_SEEDS, SUITES

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


def on_dev(suite: str, row: str, cells: AllCells) -> dict[str, float]:
    """Trial -> mean accuracy on dev, of the trials of which every dev seed is there."""
    seeds = SUITES[suite].sweep_of(row)
    start = f"{suite}|{row}|"
    trials = dict.fromkeys(n.split("|")[2] for n in cells if n.startswith(start))
    found = {}
    for trial in trials:
        dev = [cells.get(key(suite, row, trial, seed)) for seed in seeds]
        if all(dev):
            found[trial] = float(np.mean([mean_accuracy(cell) for cell in dev if cell]))
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
    """How a trial of a row without Flower is called."""
    return f"{variant} {value:g}".strip()


def field_of(name: str) -> Field:
    """A suite as the laboratory has it."""
    from benchmarks.science.laboratory.claim_rows import Field
    from benchmarks.science.laboratory.claim_states import ClaimTask

    suite = SUITES[name]
    specs = [f"{backbone}@{bits}" for backbone, bits in suite.types]
    field = Field(ClaimTask(suite.task), specs, specs[0], suite.clients)
    assert field.latent  # computed before any row is timed
    return field


class LabTrials:
    """One row without Flower on one suite: its trials on dev, then the best one on test."""

    def __init__(self, suite: str, name: str, row: LabRow, field: Field, cells: Cells) -> None:
        self.suite, self.name, self.row, self.field, self.cells = suite, name, row, field, cells

    def measure(self) -> None:
        """Whatever is missing."""
        for variant in self.row.variants:
            self._run(variant, self.row.values, DEV_SEEDS, "dev")
        while (further := self._further()) is not None:
            self._run(further[0], [further[1]], DEV_SEEDS, "dev")
        best = chosen(self.suite, self.name, self.cells.read())
        assert best is not None
        variant, _, value = best.rpartition(" ")
        self._run(variant, [float(value)], CLAIM_SEEDS, "test")

    def _further(self) -> tuple[str, float] | None:
        """The variant of the best trial, and the value by which its grid goes on."""
        if self.row.factor is None:
            return None
        tried = on_dev(self.suite, self.name, self.cells.read())
        best, _, value = max(tried, key=lambda trial: tried[trial]).rpartition(" ")
        own = [trial.rpartition(" ") for trial in tried]
        values = [float(number) for variant, _, number in own if variant == best]
        following = beyond(values, float(value), self.row.factor, len(self.row.values))
        return None if following is None else (best, following)

    def _run(self, variant: str, values: Sequence[float], seeds: Sequence[int], part: str) -> None:
        known = self.cells.read()
        missing = [
            value
            for value in values
            if any(key(self.suite, self.name, label_of(variant, value), seed) not in known for seed in seeds)
        ]  # fmt: skip
        if not missing:
            return
        start = time.perf_counter()
        right = self.row.run(self.field, seeds, missing, variant)
        seconds = round((time.perf_counter() - start) / len(seeds) / len(missing), 2)
        up = self.row.bytes_up(self.field, variant) if self.row.bytes_up else None
        new = {}
        for number, value in enumerate(missing):
            trial = label_of(variant, value)
            for place, seed in enumerate(seeds):
                new[key(self.suite, self.name, trial, seed)] = {
                    "clients": self._clients(right[number, place], seed, part),
                    "texts": len(self.field.task.parts[part]), "bytes_up_in_all": up, "seconds": seconds,
                    "machine": machine(),
                }  # fmt: skip
        self.cells.keep(new)
        means = {name.split("|")[2]: 0.0 for name in new}
        for trial in means:
            told = [
                mean_accuracy(cell) for name, cell in new.items() if name.split("|")[2] == trial
            ]
            means[trial] = round(100 * float(np.mean(told)), 1)
        say(f"{self.suite}, {self.name}, {part}: {means} ({seconds} s a run)")

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
