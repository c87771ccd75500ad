"""What can different models teach each other about answers of several tokens? The experiment that sets the method.

Eight tasks of Natural Instructions (four with one client per type) on kept states: an adapter at the last slot, its
loss over the whole vocabulary. Clients have tasks of their own, or a Dirichlet mixture. Rows: bare, alone, inside the
type, pooled data; the bank; token distributions on public answers (by a bare model, by people, by a client; the same
prompts inside the type, others untrained, prompts of other tasks); answers in words; token sums. Rates and rounds are
chosen on dev texts and a dev seed: the same grid for every row, which goes on where the best lies at its edge.

    python -m benchmarks.science.instructions --instructions FILE.jsonl.gz --suites smollm2_gemma --clients 1
    python -m benchmarks.science.instructions --instructions FILE.jsonl.gz --suites toy    # a minute, embedded models

Reading the texts takes most of an hour on one core, once; then a row takes about a minute per seed and partition. A
cell (suite, clients, partition, seed, row) is kept as it is done; what was asked for and is not there is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Cells, add_instructions, arguments, say, write_results
from benchmarks.science.claim_cells import beyond
from benchmarks.science.laboratory.text_bench import SUITES, Bench
from benchmarks.science.laboratory.text_rows import DECIDING, ROWS, bare
from benchmarks.science.laboratory.text_table import (
    BARE,
    CEILING,
    METHOD,
    RIVALS,
    chosen,
    rates_tried,
    summary,
)

PARTITIONS = ("tasks", "dirichlet")
#: Chosen on; none of the seeds that are told.
DEV_SEED = 10
SEEDS = (20, 21, 22, 23, 24)
RATES = (0.0005, 0.001, 0.002)
#: Rounds after which a run may be stopped.
STOPS = (4, 8)
CELLS = "instructions_cells"


def main() -> None:
    """Measure the cells that are missing, and write what all of them come to."""
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=["smollm2_gemma"])
    parser.add_argument("--clients", nargs="+", type=int, choices=(1, 2, 4), default=[1])
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add_instructions(parser)
    parser.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="then let bare, method, rivals and ceiling answer the first N test texts of every task (ROUGE-L)",
    )
    parser.add_argument(
        "--summary", action="store_true", help="measure nothing: write what the cells come to"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = Trial(CELLS) if given.suites == ["toy"] else Cells(CELLS)
    if not given.summary:
        if given.instructions is None:
            parser.error("the texts are needed: --instructions FILE.jsonl.gz")
        for suite in given.suites:
            for clients in given.clients:
                bench = Bench(suite, clients, Path(given.instructions), cells)
                measure(bench, given)
                if given.generate:
                    generate(bench, given)
    write(given, cells)


class Trial(Cells):
    """Cells that nobody keeps: of embedded models, that show no more than that everything runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._found: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """See :class:`Cells`."""
        return self._found

    def keep(self, new: Mapping[str, Any]) -> None:
        """See :class:`Cells`."""
        self._found |= new


def write(given: argparse.Namespace, cells: Cells) -> None:
    """Write what the cells come to; a trial's is printed."""
    found = summary(cells.read(), asked(given))
    if isinstance(cells, Trial):
        say(json.dumps(found, indent=1))
    else:
        write_results("instructions", found, anew=True)


def measure(bench: Bench, given: argparse.Namespace) -> None:
    """One suite: the rows that decide seed by seed, then the others; a row's rate and rounds are chosen first."""
    rows = _rows(given, bench.clients)
    orders = itertools.product(
        ([r for r in rows if r in DECIDING], [r for r in rows if r not in DECIDING]),
        given.partitions,
        given.seeds,
    )
    for part, partition, seed in orders:
        for row in part:
            name = f"{bench.suite} {bench.clients} {partition} {seed} {row}"
            choose(bench, row)
            known = bench.cells.read()
            best = chosen(known, bench.suite, bench.clients, row)
            if name not in known or (known[name]["rate"], known[name]["rounds"]) != best:
                bench.cells.keep({name: cell(bench, row, partition, seed)})
        if not isinstance(bench.cells, Trial):
            write(given, bench.cells)


def cell(bench: Bench, row: str, partition: str, seed: int) -> dict[str, Any]:
    """A row's clients on the test texts, and their bare models."""
    rate, rounds = chosen(bench.cells.read(), bench.suite, bench.clients, row)
    found = bench.run(row, partition, seed, rate, (rounds,), "test")
    world = bench.world("none", 0)
    holders = bench.holders(world, partition, seed, ROWS[row].smallest)
    clients, seconds = found.get(str(rounds), []), found["cpu_seconds"]
    losses = [client["all"] for client in clients]
    say(bench.suite, bench.clients, partition, seed, row, rate, rounds, losses, f"{seconds} s")
    return {
        "rate": rate, "rounds": rounds, "cpu_seconds": seconds, "clients": clients,
        "bare": [bare(world, holder, "test") for holder in holders],
    }  # fmt: skip


def choose(bench: Bench, row: str) -> None:
    """A row's rate and rounds by the dev texts, on a seed of its own and with tasks of one's own.

    Where the best rate lies at an edge of those tried, the next one is tried too.
    """
    start = f"dev {bench.suite} {bench.clients} {row} "
    for rate in RATES:
        if f"{start}{rate:g}" not in bench.cells.read():
            try_rate(bench, row, start, rate)
    while True:
        known = bench.cells.read()
        best, _ = chosen(known, bench.suite, bench.clients, row)
        following = beyond(rates_tried(known, start), best, 2.0, len(RATES))
        if following is None:
            return
        try_rate(bench, row, start, following)


def try_rate(bench: Bench, row: str, start: str, rate: float) -> None:
    """A row at a rate on dev, kept under ``start`` and the rate."""
    found = bench.run(row, "tasks", DEV_SEED, rate, STOPS, "dev")
    bench.cells.keep({f"{start}{rate:g}": found})
    told = {n: [c["all"] for c in v] for n, v in found.items() if isinstance(v, list)}
    say(f"{start}{rate:g}", told, f"{found['cpu_seconds']} s")


def generate(bench: Bench, given: argparse.Namespace) -> None:
    """ROUGE-L of the rows that matter, once their losses are measured."""
    for seed in given.seeds:
        for partition in given.partitions:
            for row in (BARE, METHOD, *RIVALS, CEILING):
                name = f"rouge {bench.suite} {bench.clients} {partition} {seed} {row}"
                if name not in bench.cells.read():
                    found = bench.rouge(row, partition, seed, given.generate)
                    bench.cells.keep({name: {"clients": found}})
                    say(name, [(client["type"], client["all"], client["own"]) for client in found])
        if not isinstance(bench.cells, Trial):
            write(given, bench.cells)


def _rows(given: argparse.Namespace, clients: int) -> list[str]:
    """Rows asked for; with one client per type alone is the same as inside the type."""
    return [row for row in given.rows if clients > 1 or row != "alone"]


def asked(given: argparse.Namespace) -> Iterator[str]:
    """Names of the cells that a command is about."""
    for suite in given.suites:
        for clients in given.clients:
            for partition in given.partitions:
                for seed in given.seeds:
                    for row in _rows(given, clients):
                        yield f"{suite} {clients} {partition} {seed} {row}"


if __name__ == "__main__":
    main()
