"""Does CMGA earn its place? Some clients go wrong, or have different tasks; what do the others keep?

In the laboratory (:mod:`.laboratory`), with the product's own chains, ten clients of three types in two federations:
``sections``, the demonstration's classes drawn from Dirichlet(0.3), and ``tasks``, where each client of a type has a
task of its own (four of the sixteen classes). In each: nothing wrong; one client in ten sends updates ten times as
long; a whole type does. Accuracy of the *others* on all classes' texts, in percent; each rule at its own learning rate,
chosen on other seeds where nothing is wrong. Who goes wrong changes from seed to seed. ``lost``: what the same clients
have more under the same rule where nothing is wrong. ``pairs_apart``: share of the pairs of clients that pull apart
(cosine below -0.1), by round.

Run: ``python -m benchmarks.science.conflict`` (minutes per backbone once, then half an hour; goes on where it stopped).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runner import load_results, say, write_results
from benchmarks.science.laboratory.chains import CHAINS, ChainServers
from benchmarks.science.laboratory.clients import LatentTask, draw_clients
from benchmarks.science.laboratory.federation import Trouble, federate
from benchmarks.science.laboratory.rows import (
    ALIGNMENT,
    METHOD,
    SCHEDULE,
    Laboratory,
    arguments,
    laboratories,
)

#: Scene -> whether something is too loud, and whether a whole type is.
SCENES = {"none": (False, False), "loud client": (True, False), "loud": (True, True)}
CLIENTS, TASKS = 10, 4
#: Rates are chosen on these seeds; the table's begin after them.
DEV_SEEDS, TEST_SEED = (10, 11, 12), 20
#: The first that are tried; as long as the best is at an edge, one more there.
RATES = (4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True)
class Federation:
    """Ten clients of a laboratory's types, who differ in their classes as ``kind`` says."""

    lab: Laboratory
    tasks: list[LatentTask]
    kind: str

    def shares(self, seeds: Sequence[int]) -> list[list[int]]:
        """Pool indices of every client, seed by seed."""
        data = self.lab.task.data
        if self.kind == "sections":
            return draw_clients(data, CLIENTS, list(seeds), self.lab.index)
        return [share for seed in seeds for share in self._tasks(seed, data.examples_per_client)]

    def _tasks(self, seed: int, count: int) -> list[list[int]]:
        """Per client some examples of its own task's classes, nobody's twice."""
        rng = np.random.default_rng(seed)
        groups = rng.permutation(len(self.lab.task.labels)).reshape(TASKS, -1)
        rows = [rng.permutation(np.isin(self.lab.task.pool_y, g).nonzero()[0]) for g in groups]
        found, taken = [], [0] * TASKS
        for client in range(CLIENTS):
            own = client // len(self.tasks) % TASKS
            found.append(rows[own][taken[own] : taken[own] + count].tolist())
            taken[own] += count
        return found

    def struck(self, scene: str, seed: int) -> list[int]:
        """Who goes wrong in a seed's run: a client, or all of a type."""
        wrong, whole_type = SCENES[scene]
        if not wrong:
            return []
        if not whole_type:
            return [seed % CLIENTS]
        return [c for c in range(CLIENTS) if c % len(self.tasks) == seed % len(self.tasks)]

    def reach(
        self, rule: str, scene: str, seeds: Sequence[int], rates: Sequence[float]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Accuracy (rates x seeds x clients), and the share of pairs that pull apart (rounds x seeds)."""
        reached = np.empty((len(rates), len(seeds), CLIENTS))
        apart = np.empty((SCHEDULE.rounds, len(seeds)))
        alike: dict[tuple[int, ...], list[int]] = {}
        for seed in seeds:
            alike.setdefault(tuple(self.struck(scene, seed)), []).append(seed)
        for struck, same in alike.items():
            servers = ChainServers(rule)
            found = federate(
                self.tasks, self.lab.targets, self.shares(same), CLIENTS, same, METHOD,
                replace(SCHEDULE, rates=tuple(rates)), ("across",), (),
                Trouble("loud", struck) if struck else None, servers=servers,
            )["across"]  # fmt: skip
            columns = [list(seeds).index(seed) for seed in same]
            reached[:, columns] = found
            apart[:, columns] = np.array(servers.conflicts)[:, -len(same) :]
        return reached, apart

    def others(
        self, reached: NDArray[np.float64], scene: str, seeds: Sequence[int]
    ) -> NDArray[np.float64]:
        """Mean over those whom a scene does not strike, from ``... x seeds x clients``."""
        kept = np.ones((len(seeds), CLIENTS))
        for row, seed in enumerate(seeds):
            kept[row, self.struck(scene, seed)] = 0
        mean: NDArray[np.float64] = (reached * kept).sum(axis=-1) / kept.sum(axis=-1)
        return mean

    def best_rate(self, rule: str) -> tuple[float, int]:
        """Where nothing is wrong, on the seeds for choosing; and how many rates were tried."""
        tried: dict[float, float] = {}
        wanted = list(RATES)
        while wanted:
            reached, _ = self.reach(rule, "none", DEV_SEEDS, wanted)
            tried |= dict(zip(wanted, reached.mean(axis=(1, 2)).tolist(), strict=True))
            best = max(tried, key=lambda rate: tried[rate])
            wanted = [best / 2] * (best == min(tried)) + [best * 2] * (best == max(tried))
        return best, len(tried)


def paired(found: NDArray[np.float64], plain: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error over seeds of what one has more than another."""
    gain = found - plain
    return round(float(gain.mean()), 2) + 0.0, round(float(gain.std(ddof=1) / len(gain) ** 0.5), 2)


def compare(
    federation: Federation, name: str, rules: Sequence[str], scenes: Sequence[str], seeds: list[int]
) -> None:
    """Measure what is not there yet, row by row."""
    for scene in scenes:
        for rule in rules:
            rows: dict[str, dict[str, Any]] = load_results("conflict").get(name, {})
            if rule in rows.get(scene, {}):
                continue
            row: dict[str, Any] = {}
            if f"{rule}.rate" not in rows.get("none", {}):
                rate, trials = federation.best_rate(rule)
                row = {f"{rule}.rate": rate, f"{rule}.rates_tried": trials}
                keep(seeds, name, "none", row)
                row = row if scene == "none" else {}
            rate = row.get(f"{rule}.rate") or rows["none"][f"{rule}.rate"]
            reached, apart = federation.reach(rule, scene, seeds, [rate])
            others = federation.others(reached[0], scene, seeds)
            row |= {
                rule: round(float(others.mean()), 2),
                f"{rule}.by_seed": others.round(2).tolist(),
                f"{rule}.pairs_apart": apart.mean(axis=1).round(4).tolist(),
            }
            if scene == "none":
                row[f"{rule}.by_client"] = reached[0].round(2).tolist()
            keep(seeds, name, scene, row)


def keep(seeds: list[int], name: str, scene: str, row: dict[str, Any]) -> None:
    """Write down a row."""
    say(name, scene, {key: value for key, value in row.items() if not isinstance(value, list)})
    head = {"seeds": seeds, "dev_seeds": list(DEV_SEEDS), "clients": CLIENTS}
    write_results("conflict", {**head, name: {scene: row}})


def conclude(federation: Federation, name: str, rules: Sequence[str], seeds: list[int]) -> None:
    """What each rule gains over the plain mean, and loses to its own where nothing is wrong."""
    rows: dict[str, dict[str, Any]] = load_results("conflict")[name]
    for scene, known in rows.items():
        told: dict[str, Any] = {}
        flat: dict[str, Any] = {}
        for rule in rules:
            if rule not in known or "mean chain" not in known or rule not in rows["none"]:
                continue
            found = np.array(known[f"{rule}.by_seed"])
            unhurt = federation.others(np.array(rows["none"][f"{rule}.by_client"]), scene, seeds)
            pair = paired(found, np.array(known["mean chain.by_seed"]))
            told[f"{rule}.gain"], told[f"{rule}.gain_se"] = pair
            told[f"{rule}.lost"], told[f"{rule}.lost_se"] = paired(unhurt, found)
            if rule == "cmga":
                flat[f"cmga_gain.{name}.{scene}"] = told["cmga.gain"]
                flat[f"others_lost.{name}.{scene}"] = told["cmga.lost"]
                apart = known["cmga.pairs_apart"]
                flat[f"pairs_apart.{name}.{scene}"] = round(sum(apart) / len(apart), 4)
        write_results("conflict", {"seeds": seeds, name: {scene: told}, **flat})


def main() -> None:
    parser = arguments(__doc__, ["tiny"], seeds=8)
    kinds = ["sections", "tasks"]
    parser.add_argument("--rules", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--federations", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(TEST_SEED, TEST_SEED + args.seeds))
    for family, lab in laboratories(args.families, least=3):
        tasks = lab.latent_tasks(lab.types, lab.align(lab.types, ALIGNMENT, METHOD))
        for kind in args.federations:
            federation = Federation(lab, tasks, kind)
            name = family if kind == "sections" else f"{family}.{kind}"
            compare(federation, name, args.rules, args.scenes, seeds)
            conclude(federation, name, list(CHAINS), seeds)


if __name__ == "__main__":
    main()
