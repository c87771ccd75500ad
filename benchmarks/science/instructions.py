"""What can different models teach each other about answers of several tokens? The experiment that sets the method.

Eight tasks of Natural Instructions (four with one client per type) on kept states: an adapter at the last slot, its
loss over the whole vocabulary. Clients have a task each, or a Dirichlet mixture of tasks. Rows: bare, alone, inside the
type, pooled data; the bank; token distributions on public answers (by a bare model, by people; the same prompts inside
the type, others untrained, prompts of other tasks); token sums. Rates and rounds are chosen on dev texts and a dev
seed, with equally many configurations for every row.

    python -m benchmarks.science.instructions --instructions FILE.jsonl.gz --suites smollm2_gemma --clients 1
    python -m benchmarks.science.instructions --instructions FILE.jsonl.gz --suites toy    # a minute, embedded models

Reading the texts takes most of an hour on one core, once; then a row takes about half a minute per seed. A cell (suite,
clients, partition, row, seed) is kept as it is done; what was asked for and is not there is listed as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Cells, arguments, say, write_results
from benchmarks.science.laboratory.text_clients import DivergedError
from benchmarks.science.laboratory.text_rows import DECIDING, ROWS, bare, federate, measured
from benchmarks.science.laboratory.text_states import TextType
from benchmarks.science.laboratory.text_sums import TokenSums
from benchmarks.science.laboratory.text_table import chosen, summary
from benchmarks.science.laboratory.text_tasks import DATA, OTHERS, TASKS
from benchmarks.science.laboratory.text_world import Holder, Texts, World, deal
from heterotune_flwr.backbones.sources import BackboneSpec

#: Suite -> its types; the first is the smallest, and writes public answers.
SUITES: Mapping[str, Sequence[tuple[str, str]]] = {
    "smollm2_gemma": (("smollm2", "nf4"), ("gemma3-270m", "int8")),
    "smollm2_pruned": (("smollm2", "nf4"), ("smollm2-pruned", "bf16")),
    "toy": (("tiny-a", "bf16"), ("tiny-b", "int8")),
}
PARTITIONS = ("tasks", "dirichlet")
#: Chosen on; none of the seeds that are told.
DEV_SEED = 10
SEEDS = (20, 21, 22, 23, 24)
RATES = (0.0005, 0.001, 0.002)
#: Rounds after which a run may be stopped.
STOPS = (4, 8)
CELLS = "instructions_cells"


@dataclass
class Bench:
    """A suite with a number of clients per type, loaded when first needed."""

    suite: str
    clients: int
    instructions: Path
    _texts: Texts | None = None
    _worlds: dict[tuple[str, int], World] | None = None

    @property
    def tasks(self) -> list[str]:
        """Four with one client per type, else all eight."""
        return list(TASKS)[: 4 if self.clients == 1 else None]

    @property
    def texts(self) -> Texts:
        """The suite's texts, read by its types."""
        if self._texts is None:
            types = [TextType(BackboneSpec(*spec), DATA) for spec in SUITES[self.suite]]
            limit = 12 if self.suite == "toy" else None
            self._texts = Texts(types, self.instructions, self.tasks, OTHERS, limit)
        return self._texts

    def world(self, maps: str, seed: int) -> World:
        """The suite behind some maps; wrong ones are drawn anew for every seed."""
        key = (maps, seed if maps != "none" else 0)
        if self._worlds is None or key not in self._worlds:
            kept = {k: v for k, v in (self._worlds or {}).items() if k[0] == "none"}
            self._worlds = kept | {key: self.texts.world(*key)}
            say(f"{self.suite}: maps {maps}, correlation {self._worlds[key].quality:.3f}")
        return self._worlds[key]

    def holders(self, world: World, partition: str, seed: int, smallest: bool) -> list[Holder]:
        """Who has which; ``smallest``: all of them with the first type."""
        types, tasks = len(world.names), len(world.task_names)
        found = deal(world.task_of["train"], tasks, types, self.clients, partition, seed)
        return [Holder(0, h.rows, h.shares) if smallest else h for h in found]

    def run(
        self, name: str, partition: str, seed: int, rate: float, rounds: Sequence[int], part: str
    ) -> dict[str, Any]:
        """What a row's clients come to on a part, after some numbers of rounds."""
        row = ROWS[name]
        world = self.world(row.maps, seed)
        holders = self.holders(world, partition, seed, row.smallest)
        sums = TokenSums(world, holders) if row.sums else None
        found: dict[str, Any] = {}
        started = time.process_time()
        try:
            history = federate(row, world, holders, rate, seed, max(rounds))
            for number, banks in enumerate(history, start=1):
                if number in rounds:
                    found[str(number)] = [
                        measured(bank, world, holder, part, sums)
                        for bank, holder in zip(banks, holders, strict=True)
                    ]
        except DivergedError as error:
            say(f"{name}: {error}")
        return found | {"cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    """Measure the cells that are missing, and write what all of them come to."""
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=["smollm2_gemma"])
    parser.add_argument("--clients", nargs="+", type=int, choices=(1, 2, 4), default=[1])
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--instructions", type=Path, default=os.environ.get("HETEROTUNE_INSTRUCTIONS"),
        help="the extract of Natural Instructions [$HETEROTUNE_INSTRUCTIONS]",
    )  # fmt: skip
    parser.add_argument(
        "--summary", action="store_true", help="write the results of the cells there are"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = Trial(CELLS) if given.suites == ["toy"] else Cells(CELLS)
    if not given.summary:
        if given.instructions is None:
            parser.error("the texts are needed: --instructions FILE.jsonl.gz")
        for suite in given.suites:
            for clients in given.clients:
                measure(Bench(suite, clients, Path(given.instructions)), given, cells)
    if isinstance(cells, Trial):
        say(json.dumps(summary(cells.read(), _asked(given)), indent=1))
    else:
        write_results("instructions", summary(cells.read(), _asked(given)), anew=True)


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


def measure(bench: Bench, given: argparse.Namespace, cells: Cells) -> None:
    """One suite: the rows that decide seed by seed, then the others; a row's rate and rounds are chosen first."""
    for deciding in (True, False):
        for seed in given.seeds:
            for row in _rows(given, bench.clients):
                if (row in DECIDING) != deciding:
                    continue
                choose(bench, row, cells)
                for partition in given.partitions:
                    name = f"{bench.suite} {bench.clients} {partition} {seed} {row}"
                    if name not in cells.read():
                        cells.keep({name: cell(bench, row, partition, seed, cells)})
            if not isinstance(cells, Trial):
                write_results("instructions", summary(cells.read(), _asked(given)), anew=True)


def cell(bench: Bench, row: str, partition: str, seed: int, cells: Cells) -> dict[str, Any]:
    """A row's clients on the test texts, and their bare models."""
    rate, rounds = chosen(cells.read(), bench.suite, bench.clients, row)
    found = bench.run(row, partition, seed, rate, (rounds,), "test")
    world = bench.world("none", 0)
    holders = bench.holders(world, partition, seed, ROWS[row].smallest)
    clients = found.get(str(rounds), [])
    seconds = found["cpu_seconds"]
    say(
        bench.suite,
        bench.clients,
        partition,
        seed,
        row,
        rate,
        rounds,
        [c["all"] for c in clients],
        seconds,
    )
    return {
        "rate": rate, "rounds": rounds, "cpu_seconds": seconds, "clients": clients,
        "bare": [bare(world, holder, "test") for holder in holders],
    }  # fmt: skip


def choose(bench: Bench, row: str, cells: Cells) -> None:
    """A row's rate and rounds by the dev texts, on a seed of its own and a task per client."""
    for rate in RATES:
        name = f"dev {bench.suite} {bench.clients} {row} {rate:g}"
        if name not in cells.read():
            found = bench.run(row, "tasks", DEV_SEED, rate, STOPS, "dev")
            cells.keep({name: found})
            told = {n: [c["all"] for c in v] for n, v in found.items() if isinstance(v, list)}
            say(name, told, f"{found['cpu_seconds']} s")


def _rows(given: argparse.Namespace, clients: int) -> list[str]:
    """Rows asked for; with one client per type alone is the same as inside the type."""
    return [row for row in given.rows if clients > 1 or row != "alone"]


def _asked(given: argparse.Namespace) -> Iterator[str]:
    for suite in given.suites:
        for clients in given.clients:
            for partition in given.partitions:
                for seed in given.seeds:
                    for row in _rows(given, clients):
                        yield f"{suite} {clients} {partition} {seed} {row}"


if __name__ == "__main__":
    main()
