"""The headline table: every method that can run, tuned, on the same clients, data, rounds and steps.

Suites: the embedded family with 3, 6, 12 and 48 clients (1, 2, 4, 16 per type; of the 48 a quarter take part in each
round), the same with 3, 6, 12 and 48 clients and public texts of the task's own kind (``near3`` to ``near48``: 2,000
unlabelled texts that no client owns instead of 6,000 about other things), with 3 and 12 and the anchors
``debian-near`` (``sections3``, ``sections12``), three real families with 3 and 6 clients (``real3_before`` and
``real3x2_before`` are earlier cells, of a pruned backbone that was healed otherwise: shown, not run), two with 2 and
4, five types (three widths at mixed bits), three clients of one parent (``parent3``: the one suite on which sub-model
extraction can run); 10 rounds. On the embedded family the bank's methods also train LoRA in every layer (as
``heterotune_deep``), on the real ones and in ``bank3`` to ``bank48`` (the embedded family again) the bank alone,
whose steps cost milliseconds. ``heterotune_plain`` is ``heterotune`` without its shared discriminant,
``within_discriminant`` the control ``within_consensus`` with one of its own type's classes. Two rows show
HeteroTune's halves: ``bank`` shares the bank in all rounds and no predictions, ``predictions`` shares the bank in the
first round alone and mixes nothing; ``lora_at_home`` shares both, while LoRA never leaves its client. Where LoRA
trains, ``heterotune_deep`` is the shipped strategy: a learning rate that sinks over the rounds and rises within each,
a longer type phase, more anchors; ``heterotune_focused`` the same with a focus of 1 (anchors of which something is
said are drawn more often), ``heterotune_plain`` without all that, and the rows that end in ``_annealed`` are its
strongest rivals with all of it that they can have. Those that end in ``_cold`` have no warm-up. ``fedmkt64`` is
FedMKT-style transfer with as many anchors as HeteroTune (512 a round, 64 a step; ``fedmkt`` has 256 and 16). Every
method first runs at each of its learning rates with seeds of their own (``Suite.sweep``), then at its best one with
``SEEDS``; where a sweep would take an hour there is a single rate (``Suite.rates``). All cells are kept in
``benchmarks/results/headline_cells.json`` as they are done, so the command goes on where it was stopped (``--again``
forgets the chosen ones first). Methods that refuse a suite (dense changes beside 4-bit weights, slices of models
without a common parent) are listed with why.

Run: ``python -m benchmarks.headline`` (days on 2 cores: LoRA trains through the whole backbone), or a part::

    python -m benchmarks.headline --suites embedded6 --methods heterotune_plain within_type local_only fed_sb

Writes ``benchmarks/results/headline.json``, ``headline.md`` and ``headline.svg`` (``pip install matplotlib`` first).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from benchmarks.common import RESULTS, SEEDS, flower_run, machine
from benchmarks.headline_report import write_report
from benchmarks.headline_suites import OPTIONS, RATES, SHOWN, SUITES, Suite, not_here, shipped
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.strategies.build import check_strategy

CELLS = RESULTS / "headline_cells.json"


def key(suite: str, method: str, rate: float, seed: int) -> str:
    """Name of one cell."""
    return f"{suite}|{method}|{rate:g}|{seed}"


def read_cells() -> dict[str, Any]:
    """All cells measured so far."""
    cells: dict[str, Any] = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    return cells


def refusal(suite: Suite, method: str) -> str | None:
    """Why a method cannot run on a suite; None where it can."""
    config = compose(suite.preset, suite.overrides())
    entry = shipped(method)
    try:
        check_strategy(method, entry, config)
    except ConfigError as error:
        return str(error)
    return None


def measure(name: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """One real Flower simulation: a method at some learning rates and seeds; returns its cells."""
    suite = SUITES[name]
    entry = shipped(method)
    extra = OPTIONS.get(method, {})
    entry |= {**extra, "train": {**entry.get("train", {}), **extra.get("train", {})}}
    strategies = {
        f"{method}-{rate:g}": {**entry, "train": {**entry.get("train", {}), "learning_rate": rate}}
        for rate in rates
    }
    preset = suite.compared(name, strategies, seeds)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(preset, file)
        file.flush()
        results = flower_run(file.name, suite.overrides())
    cells = {}
    by_name = dict(zip(strategies, rates, strict=True))
    for run in results["runs"]:
        rows = [
            {
                field: row[field]
                for field in ("client_id", "type", "global_accuracy", "personal_accuracy")
            }
            for row in run["clients"]
        ]
        cells[key(name, method, by_name[run["strategy"]], run["seed"])] = {
            "clients": rows, "bytes": run["bytes"], "seconds": round(run["seconds"], 1),
            "peak_memory_mb": run["peak_memory_mb"], "machine": machine(),
        }  # fmt: skip
    return cells


def mean_accuracy(cell: dict[str, Any]) -> float:
    """Mean global accuracy over the clients."""
    rows = cell["clients"]
    return float(sum(row["global_accuracy"] for row in rows) / len(rows))


def best_rate(name: str, method: str, cells: dict[str, Any]) -> float | None:
    """The best learning rate of a finished sweep."""
    rates = SUITES[name].rates_of(method)
    if len(rates) == 1:
        return rates[0]
    found = {rate: swept(name, method, rate, cells) for rate in rates}
    if any(value is None for value in found.values()):
        return None
    return max(found, key=lambda rate: found[rate] or 0.0)


def swept(name: str, method: str, rate: float, cells: dict[str, Any]) -> float | None:
    """Mean accuracy of a rate over the suite's sweep seeds; None where one is missing."""
    found = [cells.get(key(name, method, rate, seed)) for seed in SUITES[name].sweep_of(method)]
    return float(np.mean([mean_accuracy(cell) for cell in found if cell])) if all(found) else None


def plan(suites: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Measure what is missing, cell by cell; yields a line after each."""
    for name in suites:
        for method in methods:
            if not_here(name, method) or refusal(SUITES[name], method):
                continue
            cells = read_cells()
            rates = SUITES[name].rates_of(method)
            missing = [r for r in rates if swept(name, method, r, cells) is None]
            if missing and len(rates) > 1:
                yield _keep(measure(name, method, missing, SUITES[name].sweep_of(method)))
            cells = read_cells()
            rate = best_rate(name, method, cells)
            assert rate is not None
            wanted = [s for s in seeds if key(name, method, rate, s) not in cells]
            if wanted and SUITES[name].in_seconds(method):
                yield _keep(measure(name, method, [rate], wanted))
                continue
            for seed in wanted:  # a run each: one cut short loses one seed's minutes, not all
                yield _keep(measure(name, method, [rate], [seed]))


def forget(suites: Sequence[str], methods: Sequence[str]) -> None:
    """Drop the cells of some methods on some suites: those of a method that has changed."""
    left = {
        name: cell
        for name, cell in read_cells().items()
        if name.split("|")[0] not in suites or name.split("|")[1] not in methods
    }
    atomic_write_text(CELLS, json.dumps(left, indent=1) + "\n")


def _keep(new: dict[str, Any]) -> str:
    RESULTS.mkdir(exist_ok=True)
    atomic_write_text(CELLS, json.dumps({**read_cells(), **new}, indent=1) + "\n")
    return "; ".join(f"{name}: {100 * mean_accuracy(cell):.1f} %" for name, cell in new.items())


def table(suites: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Per suite and method: the cells of its best rate, the sweep, or why it was refused."""
    cells = read_cells()
    found: dict[str, Any] = {}
    for name in suites:
        for method in RATES:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    runnable = [name for name in SUITES if name not in SHOWN]
    parser.add_argument("--suites", nargs="+", choices=runnable, default=runnable)
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--report", action="store_true", help="only write the tables of what is there"
    )
    parser.add_argument(
        "--again", action="store_true", help="forget these suites' and methods' cells first"
    )
    args = parser.parse_args()
    if args.again:
        forget(args.suites, args.methods)
    bank_alone = [name for name, suite in SUITES.items() if not suite.with_lora]
    if not args.report:
        for line in plan(args.suites, args.methods, args.seeds):
            print(line, flush=True)
            write_report(table(list(SUITES), args.seeds), args.seeds, bank_alone)
    write_report(table(list(SUITES), args.seeds), args.seeds, bank_alone)


if __name__ == "__main__":
    main()
