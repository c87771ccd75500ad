"""The headline table: every method that can run, tuned, on the same clients, data, 10 rounds and steps.

Claims are a task by a family by the clients of each type, ``sections.smollm2_gemma.1`` for example
(:mod:`.headline_suites`, :mod:`.tasks`). Every row has as many trials: chosen on dev texts and seeds 10 to 12, a grid
going on where its best value lies at its edge; then measured on test texts, seeds 20 to 27.

* Floor: ``untouched``, ``majority``, ``alone``. Controls: ``within`` a type; all on the ``smallest`` model. Ceiling:
  one bank on ``pooled_data`` (read by the model that is tested) or ``pooled_latents``, a client's adapter and steps.
* Rivals that need no Flower: ``pooled_ngrams`` without any model; ``fedncm`` and ``fedcof``, class means of what
  everybody reads with the smallest model (:mod:`.laboratory.common_encoder`).
* Rows of a real Flower simulation: ``heterotune``, with class sums off ``heterotune_plain``, its predictions and class
  sums inside a type ``within_discriminant``, ``fedit``, ``fedmkt``, ``fedmosaic``.

Rows without Flower take seconds a run, on states that are computed once (minutes per task and backbone)::

    python -m benchmarks.science.headline --suites sections.smollm2_gemma.1 --methods alone within pooled_data fedcof

Earlier suites, of one task, were chosen on the texts that they tell. They are run only when named: the embedded family
with 1, 2, 4 and 16 clients per type, five types, other anchors (``sections12``, ``near12``), slices of one parent
(``parent3``), and two and three real families. On ``embedded*``, ``near12``, ``sections12`` and ``types5`` every method
also trains LoRA in every layer. ``bank`` shares the bank in all rounds and no predictions, ``predictions`` the bank in
the first round alone; ``*_annealed`` are rivals with HeteroTune's anchors, sinking rate and warm-up, ``*_cold`` without
warm-up, ``fedmkt64`` FedMKT-style transfer with as many anchors. Seeds 20 to 22.

Cells are kept in ``headline_cells.json`` as they are done, so the command goes on where it was stopped (``--again``
forgets the chosen ones first). Run: ``python -m benchmarks.science.headline`` for all claims (days on 2 cores: LoRA
trains through the whole backbone). ``python -m benchmarks.report`` makes the tables and the figure of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.runner import SEEDS, Cells, arguments, say
from benchmarks.science.claim_cells import LabTrials, field_of, key, mean_accuracy
from benchmarks.science.claim_flower import FlowerTrials, cell_of, simulated
from benchmarks.science.headline_suites import (
    CLAIM_ROWS,
    CLAIMS,
    EARLIER,
    ROWS,
    SUITES,
    Suite,
    not_here,
    trial,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.build import check_strategy

CELLS = Cells("headline_cells")


def refusal(suite: Suite, method: str) -> str | None:
    """Why a method cannot run on a suite; None where it can."""
    try:
        entry = trial(method, suite.rates_of(method)[0])
        check_strategy(method, entry, compose(suite.preset, suite.overrides()))
    except ConfigError as error:
        return str(error)
    return None


def measure(name: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """One real Flower simulation of an earlier suite: a method at some learning rates and seeds; returns its cells."""
    strategies = {f"{rate:g}": trial(method, rate) for rate in rates}
    runs = simulated(name, strategies, seeds, SUITES[name].overrides())
    return {key(name, method, run["strategy"], run["seed"]): cell_of(run) for run in runs}


def swept(name: str, method: str, rate: float, cells: dict[str, Any]) -> float | None:
    """Mean accuracy of a rate over the suite's sweep seeds; None where one is missing."""
    found = [
        cells.get(key(name, method, f"{rate:g}", seed)) for seed in SUITES[name].sweep_of(method)
    ]
    return float(np.mean([mean_accuracy(cell) for cell in found if cell])) if all(found) else None


def best_rate(name: str, method: str, cells: dict[str, Any]) -> float | None:
    """The best learning rate of a finished sweep."""
    rates = SUITES[name].rates_of(method)
    if len(rates) == 1:
        return rates[0]
    found = {rate: swept(name, method, rate, cells) for rate in rates}
    if any(value is None for value in found.values()):
        return None
    return max(found, key=lambda rate: found[rate] or 0.0)


def missing(
    name: str, method: str, seeds: Sequence[int]
) -> Iterator[tuple[Sequence[float], Sequence[int]]]:
    """Rates and seeds of the runs that a method still needs: its sweep, then its best rate."""
    suite = SUITES[name]
    rates = suite.rates_of(method)
    untried = [rate for rate in rates if swept(name, method, rate, CELLS.read()) is None]
    if untried and len(rates) > 1:
        yield untried, suite.sweep_of(method)
    rate = best_rate(name, method, CELLS.read())
    assert rate is not None
    wanted = [seed for seed in seeds if key(name, method, f"{rate:g}", seed) not in CELLS.read()]
    if wanted and suite.in_seconds(method):
        yield [rate], wanted
        return
    for seed in wanted:  # a run each: one cut short loses one seed's minutes, not all
        yield [rate], [seed]


def table(
    suites: Sequence[str] = tuple(EARLIER), seeds: Sequence[int] = tuple(SEEDS)
) -> dict[str, Any]:
    """Per earlier suite and method: the cells of its best rate and the sweep, or why it was refused."""
    cells = CELLS.read()
    found: dict[str, Any] = {}
    for name in suites:
        for method in ROWS:
            if not_here(name, method):
                continue
            rate = best_rate(name, method, cells)
            if rate is None:
                if reason := refusal(SUITES[name], method):
                    found.setdefault(name, {})[method] = {"refused": reason}
                continue
            chosen = {s: cells.get(key(name, method, f"{rate:g}", s)) for s in seeds}
            if all(chosen.values()):
                tried = {r: swept(name, method, r, cells) for r in SUITES[name].rates_of(method)}
                sweep = {f"{r:g}": round(100 * a, 2) for r, a in tried.items() if a is not None}
                found.setdefault(name, {})[method] = {"rate": rate, "sweep": sweep, "cells": chosen}
    return found


def measure_earlier(name: str, method: str, seeds: Sequence[int]) -> None:
    """A row of an earlier suite: its sweep, then its best rate."""
    for rates, own in missing(name, method, seeds):
        cells = measure(name, method, rates, own)
        CELLS.keep(cells)
        say("; ".join(f"{n}: {100 * mean_accuracy(c):.1f} %" for n, c in cells.items()))


def main() -> None:
    from benchmarks.science.laboratory.claim_rows import ROWS as LAB_ROWS

    torch.set_num_threads(1)
    parser = arguments(__doc__, SEEDS)
    methods = [*LAB_ROWS, *ROWS]
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(CLAIMS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument(
        "--again", action="store_true", help="forget these suites' and methods' cells first"
    )
    args = parser.parse_args()
    if args.again:
        CELLS.forget(lambda c: c.split("|")[0] in args.suites and c.split("|")[1] in args.methods)
    for name in args.suites:
        in_laboratory = [method for method in args.methods if method in LAB_ROWS and name in CLAIMS]
        field = field_of(name) if in_laboratory else None
        for method in in_laboratory:
            LabTrials(name, method, LAB_ROWS[method], field, CELLS).measure()
        for method in args.methods:
            if method not in ROWS or not_here(name, method) or refusal(SUITES[name], method):
                continue
            if name in EARLIER:
                measure_earlier(name, method, args.seeds)
            elif method in CLAIM_ROWS:
                FlowerTrials(name, method, CELLS).measure()


if __name__ == "__main__":
    main()
