"""A suite of the experiment on answers: its types and texts, loaded when first needed, and what a row comes to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import Cells, say
from benchmarks.science.laboratory.text_clients import Bank, DivergedError, canonical
from benchmarks.science.laboratory.text_deal import Holder, deal
from benchmarks.science.laboratory.text_rows import ROWS, federate, measured
from benchmarks.science.laboratory.text_states import TextType
from benchmarks.science.laboratory.text_sums import TokenSums
from benchmarks.science.laboratory.text_table import BARE, FLOOR, chosen
from benchmarks.science.laboratory.text_tasks import DATA, OTHERS, TASKS
from benchmarks.science.laboratory.text_world import CLIENTS, METHOD, Texts, World
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.text_metrics import rouge_l
from heterotune_flwr.seeds import generator

#: Suite -> its types; the first is the smallest, and writes public answers.
SUITES: Mapping[str, Sequence[tuple[str, str]]] = {
    "smollm2_gemma": (("smollm2", "nf4"), ("gemma3-270m", "int8")),
    "smollm2_pruned": (("smollm2", "nf4"), ("smollm2-pruned", "bf16")),
    "toy": (("tiny-a", "bf16"), ("tiny-b", "int8")),
}
#: Rows per task and part of the toy.
_TOY = 12


@dataclass
class Bench:
    """A suite with a number of clients per type; ``cells`` hold what dev texts chose."""

    suite: str
    clients: int
    instructions: Path
    cells: Cells
    _texts: Texts | None = None
    _worlds: dict[tuple[str, int], World] = field(default_factory=dict)
    _told: tuple[str, int] | None = None

    @property
    def texts(self) -> Texts:
        """The suite's texts, read by its types: of four tasks with one client per type, else of all eight."""
        if self._texts is None:
            types = [TextType(BackboneSpec(*spec), DATA) for spec in SUITES[self.suite]]
            tasks = list(TASKS)[: 4 if self.clients == 1 else None]
            limit = _TOY if self.suite == "toy" else None
            self._texts = Texts(types, self.instructions, tasks, OTHERS, limit)
        return self._texts

    def world(self, maps: str, seed: int) -> World:
        """The suite behind some maps; wrong ones are drawn anew for every seed."""
        key = (maps, seed if maps != "none" else 0)
        if key not in self._worlds:
            kept = {k: v for k, v in self._worlds.items() if k[0] == "none"}
            self._worlds = kept | {key: self.texts.world(*key)}
            say(f"{self.suite}: maps {maps}, correlation {self._worlds[key].quality:.3f}")
        return self._worlds[key]

    def holders(self, world: World, partition: str, seed: int, smallest: bool) -> list[Holder]:
        """Who has which; ``smallest``: all of them with the first type."""
        types, tasks = len(world.names), len(world.task_names)
        found = deal(world.task_of["train"], tasks, types, self.clients, partition, seed)
        return [Holder(0, h.rows, h.shares) if smallest else h for h in found]

    def _place(self, name: str, partition: str, seed: int) -> tuple[World, list[Holder]]:
        """A row's world and clients; where clients write public answers, these are written."""
        row = ROWS[name]
        world = self.world(row.maps, seed)
        if row.teach == CLIENTS:
            self._tell(world, partition, seed)
        return world, self.holders(world, partition, seed, row.smallest)

    def run(
        self, name: str, partition: str, seed: int, rate: float, rounds: Sequence[int], part: str
    ) -> dict[str, Any]:
        """What a row's clients come to on a part, after some numbers of rounds; without those where it diverged."""
        row = ROWS[name]
        world, holders = self._place(name, partition, seed)
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

    def trained(
        self, name: str, partition: str, seed: int
    ) -> tuple[World, list[Holder], list[Bank]]:
        """A row's world, clients and banks at the rate and after the rounds that dev texts chose."""
        world, holders = self._place(name, partition, seed)
        rate, rounds = chosen(self.cells.read(), self.suite, self.clients, name)
        *_, banks = federate(ROWS[name], world, holders, rate, seed, rounds)
        return world, holders, banks

    def _write(
        self, world: World, holder: Holder, bank: Bank, examples: Sequence[Example]
    ) -> list[str]:
        own, maps = self.texts.types[holder.kind], world.maps[holder.kind]
        return own.write(examples, METHOD, maps, canonical(bank))

    def _tell(self, world: World, partition: str, seed: int) -> None:
        """Each public prompt is answered once, by a client that is drawn, as it is after training inside its type."""
        if self._told == (partition, seed):
            return
        _, holders, banks = self.trained(FLOOR, partition, seed)
        prompts = [example for rows in self.texts.examples["human"] for example in rows]
        writer = generator(seed, "texts.writers").integers(len(holders), size=len(prompts))
        answers = [""] * len(prompts)
        for number, (holder, bank) in enumerate(zip(holders, banks, strict=True)):
            own = np.flatnonzero(writer == number).tolist()
            for place, answer in zip(
                own, self._write(world, holder, bank, [prompts[i] for i in own]), strict=True
            ):
                answers[place] = answer
        self.texts.tell(world, answers)
        self._told = (partition, seed)

    def rouge(self, name: str, partition: str, seed: int, count: int) -> list[dict[str, Any]]:
        """ROUGE-L (percent) of the answers that a row's clients write to the first texts of every task's test."""
        tests = [rows[:count] for rows in self.texts.examples["test"]]
        flat = [example for rows in tests for example in rows]
        tasks = np.repeat(np.arange(len(tests)), list(map(len, tests)))
        world, holders, banks = self.trained(FLOOR if name == BARE else name, partition, seed)
        found = []
        for holder, bank in zip(holders, banks, strict=True):
            if name == BARE:
                answers = self.texts.types[holder.kind].written(flat, "test")
            else:
                answers = self._write(world, holder, bank, flat)
            pairs = zip(answers, flat, strict=True)
            scores = np.array([100 * rouge_l(answer, e.answers) for answer, e in pairs])
            by_task = [float(scores[tasks == task].mean()) for task in range(len(tests))]
            found.append(
                {
                    "type": world.names[holder.kind],
                    "all": round(float(scores.mean()), 3),
                    "own": round(float(np.dot(holder.shares, by_task)), 3),
                    "answers": len(flat),
                    "scores": [round(float(score), 1) for score in scores],
                }
            )
        return found
