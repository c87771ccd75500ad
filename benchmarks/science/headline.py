"""The headline table: every method that can run, tuned, on the same clients, data, 10 rounds and steps.

Suites (:mod:`.headline_suites`): the embedded family with 1, 2, 4 and 16 clients per type (of the 48 a quarter take
part in each round), five types, anchors of the task's kind (``sections12``: ``debian-near``; ``near12``: 2,000 of the
task's own texts, unlabelled, that no client owns), slices of one parent (``parent3``), and two and three real families
with 1 and 2 clients per type. On ``embedded*``, ``near12``, ``sections12`` and ``types5`` every method also trains LoRA
in every layer; on ``bank*`` and the real families the bank alone, whose steps cost milliseconds.

Rows beside the shipped strategies: ``heterotune_plain`` is ``heterotune`` without its shared discriminant,
``heterotune_without_discriminant`` the same of ``heterotune_deep``; ``bank`` shares the bank in all rounds and no
predictions, ``predictions`` the bank in the first round alone and mixes nothing; ``lora_at_home`` shares both, while
LoRA never leaves its client. ``*_annealed`` are rivals with HeteroTune's anchors, sinking rate and warm-up, ``*_cold``
rows without warm-up, ``fedmkt64`` FedMKT-style transfer with as many anchors as HeteroTune.

Every method first runs at each of its learning rates with seeds of their own, then at its best one with ``SEEDS``;
where a sweep would take an hour there is a single rate. Cells are kept in ``headline_cells.json`` as they are done, so
the command goes on where it was stopped (``--again`` forgets the chosen ones first). Methods that refuse a suite are
listed with why.

Run: ``python -m benchmarks.science.headline`` (days on 2 cores: LoRA trains through the whole backbone), or a part::

    python -m benchmarks.science.headline --suites embedded6 --methods heterotune_plain within_type local_only fed_sb

``python -m benchmarks.report`` makes the tables and the figure of what is there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from benchmarks.runner import SEEDS, Cells, arguments, flower_run, machine, say
from benchmarks.science.headline_suites import ROWS, SUITES, Suite, not_here, shipped
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.build import check_strategy

CELLS = Cells("headline_cells")
_FIELDS = ("client_id", "type", "global_accuracy", "personal_accuracy")


def key(suite: str, method: str, rate: float, seed: int) -> str:
    """Name of one cell."""
    return f"{suite}|{method}|{rate:g}|{seed}"


def refusal(suite: Suite, method: str) -> str | None:
    """Why a method cannot run on a suite; None where it can."""
    try:
        check_strategy(method, shipped(method), compose(suite.preset, suite.overrides()))
    except ConfigError as error:
        return str(error)
    return None


def measure(name: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """One real Flower simulation: a method at some learning rates and seeds; returns its cells."""
    suite, entry, extra = SUITES[name], shipped(method), ROWS[method].options
    train = {**entry.get("train", {}), **extra.get("train", {})}
    strategies = {
        f"{method}-{rate:g}": {**entry, **extra, "train": {**train, "learning_rate": rate}}
        for rate in rates
    }
    preset = suite.compared(name, strategies, seeds)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(preset, file)
        file.flush()
        results = flower_run(file.name, suite.overrides())
    by_name = dict(zip(strategies, rates, strict=True))
    return {
        key(name, method, by_name[run["strategy"]], run["seed"]): {
            "clients": [{field: row[field] for field in _FIELDS} for row in run["clients"]],
            "bytes": run["bytes"], "seconds": round(run["seconds"], 1),
            "peak_memory_mb": run["peak_memory_mb"], "machine": machine(),
        }
        for run in results["runs"]
    }  # fmt: skip


def mean_accuracy(cell: dict[str, Any]) -> float:
    """Mean global accuracy over the clients."""
    return float(np.mean([row["global_accuracy"] for row in cell["clients"]]))


def swept(name: str, method: str, rate: float, cells: dict[str, Any]) -> float | None:
    """Mean accuracy of a rate over the suite's sweep seeds; None where one is missing."""
    found = [cells.get(key(name, method, rate, seed)) for seed in SUITES[name].sweep_of(method)]
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
    wanted = [seed for seed in seeds if key(name, method, rate, seed) not in CELLS.read()]
    if wanted and suite.in_seconds(method):
        yield [rate], wanted
        return
    for seed in wanted:  # a run each: one cut short loses one seed's minutes, not all
        yield [rate], [seed]


def table(
    suites: Sequence[str] = tuple(SUITES), seeds: Sequence[int] = tuple(SEEDS)
) -> dict[str, Any]:
    """Per suite and method: the cells of its best rate and the sweep, or why it was refused."""
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
            chosen = {s: cells.get(key(name, method, rate, s)) for s in seeds}
            if all(chosen.values()):
                tried = {r: swept(name, method, r, cells) for r in SUITES[name].rates_of(method)}
                sweep = {f"{r:g}": round(100 * a, 2) for r, a in tried.items() if a is not None}
                found.setdefault(name, {})[method] = {"rate": rate, "sweep": sweep, "cells": chosen}
    return found


def main() -> None:
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--again", action="store_true", help="forget these suites' and methods' cells first"
    )
    args = parser.parse_args()
    if args.again:
        CELLS.forget(lambda c: c.split("|")[0] in args.suites and c.split("|")[1] in args.methods)
    for name in args.suites:
        for method in args.methods:
            if not_here(name, method) or refusal(SUITES[name], method):
                continue
            for rates, seeds in missing(name, method, args.seeds):
                cells = measure(name, method, rates, seeds)
                CELLS.keep(cells)
                say("; ".join(f"{n}: {100 * mean_accuracy(c):.1f} %" for n, c in cells.items()))


if __name__ == "__main__":
    main()
