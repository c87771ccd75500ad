"""Does CMGA earn its place? Some clients go wrong, or have different tasks; what do the others keep?

In the laboratory (:mod:`.laboratory`), with the product's own chains, ten clients of three types in two federations:
``sections``, the demonstration's classes drawn from Dirichlet(0.3), and ``tasks``, where each client of a type has a
task of its own (four of the sixteen classes). In each: nothing wrong; one client in ten sends updates ten times as
long; a whole type does; a whole type learns a wrong answer for every label. Accuracy of the *others* on all classes'
texts, in percent; each rule at its own learning rate, chosen in that very scene on other seeds from equally many. Who
goes wrong changes from seed to seed. ``lost``: what the same clients have more under the same rule where nothing is
wrong. And the share of pairs of clients that pull apart (cosine below -0.1), by round.

Run: ``python -m benchmarks.science.conflict`` (minutes per backbone once, then half an hour).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runner import say, write_results
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

#: Scene -> what is wrong, and whether with a whole type.
SCENES = {
    "none": ("", False),
    "loud client": ("loud", False),
    "loud": ("loud", True),
    "wrong": ("wrong", True),
}
CLIENTS, TASKS = 10, 4
#: Rates are chosen on these seeds; the table's begin after them.
DEV_SEEDS, TEST_SEED = (10, 11, 12), 20
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


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
        kind, whole_type = SCENES[scene]
        if not kind:
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
                Trouble(SCENES[scene][0], struck) if struck else None, servers,
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


def paired(found: NDArray[np.float64], plain: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error over seeds of what one has more than another."""
    gain = found - plain
    return round(float(gain.mean()), 2), round(float(gain.std(ddof=1) / len(gain) ** 0.5), 2)


def measure(
    federation: Federation, scene: str, rule: str, seeds: list[int]
) -> tuple[float, NDArray[np.float64], list[float]]:
    """A rule's best rate on the seeds for choosing; there: accuracy (seeds x clients), and which share pulls apart."""
    tried, _ = federation.reach(rule, scene, DEV_SEEDS, RATES)
    rate = RATES[int(federation.others(tried, scene, DEV_SEEDS).mean(axis=1).argmax())]
    reached, apart = federation.reach(rule, scene, seeds, [rate])
    return rate, reached[0], [round(float(share), 4) for share in apart.mean(axis=1)]


def compare(federation: Federation, family: str, rules: Sequence[str], seeds: list[int]) -> None:
    """All scenes of a federation, each row kept when it is done."""
    head = {
        "seeds": seeds, "dev_seeds": list(DEV_SEEDS), "clients": CLIENTS, "rates": list(RATES),
        "trials_per_row": len(RATES) * len(DEV_SEEDS),
    }  # fmt: skip
    name = family if federation.kind == "sections" else f"{family}.{federation.kind}"
    healthy: dict[str, NDArray[np.float64]] = {}
    for scene in SCENES:
        plain: NDArray[np.float64] | None = None
        for rule in rules:
            rate, reached, apart = measure(federation, scene, rule, seeds)
            healthy.setdefault(rule, reached)
            found = federation.others(reached, scene, seeds)
            lost = federation.others(healthy[rule], scene, seeds)
            row: dict[str, Any] = {
                rule: round(float(found.mean()), 2),
                f"{rule}.rate": rate,
                f"{rule}.pairs_apart": apart,
                f"{rule}.by_seed": found.round(2).tolist(),
            }
            row[f"{rule}.lost"], row[f"{rule}.lost_se"] = paired(lost, found)
            plain = found if plain is None else plain
            row[f"{rule}.gain"], row[f"{rule}.gain_se"] = paired(found, plain)
            flat = {
                f"cmga_gain.{name}.{scene}": row[f"{rule}.gain"],
                f"others_lost.{name}.{scene}": row[f"{rule}.lost"],
                f"pairs_apart.{name}.{scene}": round(float(np.mean(apart)), 4),
            }
            say(name, scene, row)
            write_results(
                "conflict", {**head, name: {scene: row}, **(flat if rule == "cmga" else {})}
            )


def main() -> None:
    parser = arguments(__doc__, ["tiny"], seeds=8)
    parser.add_argument("--rules", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    kinds = ["sections", "tasks"]
    parser.add_argument("--federations", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(TEST_SEED, TEST_SEED + args.seeds))
    for family, lab in laboratories(args.families, least=3):
        tasks = lab.latent_tasks(lab.types, lab.align(lab.types, ALIGNMENT, METHOD))
        for kind in args.federations:
            compare(Federation(lab, tasks, kind), family, args.rules, seeds)


if __name__ == "__main__":
    main()
