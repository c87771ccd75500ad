"""Does CMGA earn its place? One type of three goes wrong; what do the others keep?

In the laboratory (:mod:`.laboratory`), with the product's own chains: one type's clients have shuffled labels,
are taught a wrong answer for every label, or send updates ten times as long; and nothing wrong at all, where CMGA
must cost nothing. Accuracy of the *other* types, in percent, mean over which type it is, each rule at its own best
learning rate, chosen on other seeds; the other rules of the literature beside it.

Run: ``python -m benchmarks.science.conflict`` (minutes per backbone once, then about half an hour).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import say, write_results
from benchmarks.science.laboratory.chains import CHAINS
from benchmarks.science.laboratory.clients import LatentTask, draw_clients
from benchmarks.science.laboratory.federation import Trouble, federate
from benchmarks.science.laboratory.rows import (
    ALIGNMENT,
    METHOD,
    SCHEDULE,
    Laboratory,
    arguments,
    laboratories,
    seeds_of,
    tuned,
)

TROUBLES = ("none", "shuffled", "wrong", "loud")
RATES = (1e-3, 4e-3)


def others_accuracy(
    lab: Laboratory, tasks: list[LatentTask], rule: str, kind: str, clients: int, seeds: list[int]
) -> NDArray[np.float64]:
    """Mean accuracy of the types without trouble, per seed; averaged over which type has it."""
    total = clients * len(tasks)
    shares = draw_clients(lab.task.data, total, seeds, lab.index)
    schedule = replace(SCHEDULE, rule=rule, rates=RATES)
    found = []
    for struck in range(len(tasks)) if kind != "none" else [-1]:
        trouble = None if kind == "none" else Trouble(kind, struck)
        reached = federate(
            tasks, lab.targets, shares, total, seeds, METHOD, schedule, ("across",), (), trouble
        )["across"]
        healthy = [i for i in range(total) if i % len(tasks) != struck]
        found.append(tuned(reached[:, :, healthy]).mean(axis=1))
    return np.asarray(np.mean(found, axis=0))


def gain_over(found: NDArray[np.float64], plain: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    gain = found - plain
    return round(float(gain.mean()), 2), round(float(gain.std(ddof=1) / len(gain) ** 0.5), 2)


def main() -> None:
    parser = arguments(__doc__, ["tiny"], seeds=4)
    parser.add_argument("--clients", type=int, default=4, help="per type")
    parser.add_argument("--rules", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    args = parser.parse_args()
    seeds = seeds_of(args)
    head = {"seeds": seeds, "clients_per_type": args.clients}
    for family, lab in laboratories(args.families, least=3):
        tasks = lab.latent_tasks(lab.types, lab.align(lab.types, ALIGNMENT, METHOD))
        for kind in TROUBLES:
            plain: NDArray[np.float64] | None = None
            for rule in args.rules:
                found = others_accuracy(lab, tasks, rule, kind, args.clients, seeds)
                row: dict[str, Any] = {rule: round(float(found.mean()), 2)}
                plain = found if plain is None else plain
                if found is not plain:
                    row[f"{rule}.gain"], row[f"{rule}.gain_se"] = gain_over(found, plain)
                flat = {f"cmga_gain.{family}.{kind}": row["cmga.gain"]} if rule == "cmga" else {}
                say(kind, row)
                write_results("conflict", {**head, family: {kind: row}, **flat})


if __name__ == "__main__":
    main()
