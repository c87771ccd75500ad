"""What does leaving out a part of ``heterotune`` cost? Every mechanism alone, on labels and on longer answers.

Whole federations in one process (messages go over the wire), paired by seed with the preset, on three tasks:

* ``sections`` and ``wordnet``: labels, two genuine families (SmolLM2-135M nf4, Gemma-3-270M int8), one client per type;
* ``instructions``: four tasks of Natural Instructions, a task per client, two embedded models with two clients each
  (the genuine ones need half an hour a run there). Public texts: inputs of the same tasks, answered by SmolLM2.

Mechanisms that are off in the preset stand below: what leaving them out costs is what having them gains. All rows
have the learning rate that the headline chose for the whole on dev texts (longer answers: 0.004). A cost is in
points of accuracy or in nats of loss per answer token, larger is worse; intervals are over seeds (Student, 95 %).

Run: ``python -m benchmarks.science.mechanisms --instructions FILE.jsonl.gz`` (an hour on a core, once states are kept).
"""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.runner import (
    Cells,
    add_instructions,
    arguments,
    machine,
    merged,
    say,
    write_results,
)
from benchmarks.science.claim_cells import chosen, parsed
from benchmarks.science.headline import CELLS as HEADLINE
from benchmarks.science.headline_suites import CLAIM_SEEDS, shipped
from benchmarks.science.intervals import two_way_interval
from benchmarks.science.mechanism_rows import (
    BOTH,
    FULL,
    ROWS,
    SMALLER,
    TEXT,
    Row,
    overrides_of,
    suite_name,
    suite_of,
)
from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal

#: Not chosen: a run on longer answers takes minutes.
TEXT_RATE = 4e-3
_CELLS = Cells("mechanisms_cells")


def entry_of(task: str, row: Row, rate: float) -> dict[str, Any]:
    """The preset without a row's part, at a learning rate."""
    entry = merged(shipped("heterotune"), SMALLER if task in TEXT else {})
    found: dict[str, Any] = merged(merged(entry, row.options), {"train": {"learning_rate": rate}})
    return found


def measure(
    task: str, rows: Sequence[str], rate: float, seeds: Sequence[int], given: Path | None
) -> None:
    """Runs of some rows that are not kept yet."""
    known = _CELLS.read()
    for seed, name in itertools.product(seeds, rows):
        row, cell = ROWS[name], f"{task}|test|{name}|{seed}"
        if cell in known:
            continue
        preset = suite_of(task).compared(task, {name: entry_of(task, row, rate)}, [seed])
        run = federated(preset, [*overrides_of(task, given), *row.overrides])
        _CELLS.keep({cell: cell_of(run)})
        say(cell, f"{badness(task, cell_of(run)):.3f}", f"{run['seconds']:.0f} s")


def federated(preset: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The one run of a preset: messages go over the wire, clients stay in this process."""
    with tempfile.TemporaryDirectory(prefix="heterotune-benchmark-") as folder:
        path = Path(folder) / "mechanism.yaml"
        path.write_text(yaml.safe_dump(dict(preset)))
        words = shlex.join([*overrides, f"run.dir={folder}/run"])
        config = compose(str(path), words)
        clients = sum(entry.clients for entry in config.types)
        nodes = [{"partition-id": n, "num-partitions": clients} for n in range(clients)]
        grid = InProcessGrid(app, nodes, {"config": str(path), "overrides": words})
        journal = Journal(Path(folder) / "run")
        run: dict[str, Any] = run_strategies(grid, config, journal, "mechanism")["runs"][0]
    return run


def cell_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    tests = [f"{reach}_{what}" for reach in ("global", "personal") for what in ("accuracy", "loss")]
    return {
        "clients": [{n: c[n] for n in ("client_id", "type", *tests) if n in c} for c in run["clients"]],
        "seconds": round(run["seconds"], 1), "machine": machine(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ what they come to


def badness(task: str, cell: Mapping[str, Any], reach: str = "global") -> float:
    """Mean over clients on the common or their own tests: accuracy below 100 in points, or loss in nats."""
    if task in TEXT:
        return float(np.mean([client[f"{reach}_loss"] for client in cell["clients"]]))
    return 100 - 100 * float(np.mean([client[f"{reach}_accuracy"] for client in cell["clients"]]))


def best_rate(task: str) -> float:
    """Of labels the rate at which the whole preset is best on dev, as the headline chose it; else a fixed one."""
    if task in TEXT:
        return TEXT_RATE
    trial = chosen(suite_name(task), "heterotune", HEADLINE.read())
    if trial is None:
        raise SystemExit(f"measure the rate of {task} first: benchmarks.science.headline")
    return parsed(trial)[1]


def costs(task: str, seeds: Sequence[int]) -> dict[str, float]:
    """Flat: ``<task>.<mechanism>.<cost | own_cost>`` with ``_low`` and ``_high``, of rows with every seed."""
    cells, found = _CELLS.read(), {}
    for name, reach in itertools.product(ROWS, ("global", "personal")):
        key = "cost" if reach == "global" else "own_cost"
        own, full = ([cells.get(f"{task}|test|{n}|{s}") for s in seeds] for n in (name, FULL))
        if not all(own) or not all(full):
            continue
        left, whole = (
            np.array([badness(task, cell, reach) for cell in side if cell]) for side in (own, full)
        )
        if name == FULL:
            found[f"{task}.{FULL}.{key.replace('cost', 'level')}"] = float(whole.mean())
            continue
        told = two_way_interval((whole - left if ROWS[name].added else left - whole)[:, None])
        for end, value in (("", "gain"), ("_low", "low"), ("_high", "high")):
            found[f"{task}.{name}.{key}{end}"] = told[value]
    return {key: round(value, 4) for key, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    parser = arguments(__doc__, CLAIM_SEEDS)
    parser.add_argument("--tasks", nargs="+", choices=BOTH, default=list(BOTH))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add_instructions(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help="forget these tasks' cells first: the preset has changed",
    )
    given = parser.parse_args()
    if given.again:
        _CELLS.forget(lambda cell: cell.split("|")[0] in given.tasks)
    for task in given.tasks:
        if task in TEXT and given.instructions is None:
            say(f"{task}: left out (no --instructions FILE)")
            continue
        rate = best_rate(task)
        rows = [name for name in dict.fromkeys([FULL, *given.rows]) if task in ROWS[name].tasks]
        measure(task, rows, rate, given.seeds, given.instructions)
        facts = {
            f"{task}.rate": rate,
            f"{task}.seeds": given.seeds,
            "trials_per_row": 1,
            **costs(task, given.seeds),
        }
        write_results("mechanisms", facts)


if __name__ == "__main__":
    main()
