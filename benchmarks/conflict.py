"""Does CMGA earn its place? One type of three goes wrong; what do the others keep?

In the laboratory (:mod:`.alignment_probe`), with the product's own chains: one type's clients have shuffled labels,
are taught a wrong answer for every label, or send updates ten times as long; and nothing wrong at all, where CMGA
must cost nothing. Accuracy of the *other* types, in percent, each rule at its own best learning rate, chosen on other
seeds; the other rules of the literature beside it.

Run: ``python -m benchmarks.conflict`` (minutes per backbone once, for the states; then about half an hour).
Writes ``benchmarks/results/conflict.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.alignment_probe import (
    ALIGNMENT,
    FAMILIES,
    FIRST_SEED,
    METHOD,
    SCHEDULE,
    Laboratory,
    present,
    tuned,
)
from benchmarks.common import write_results
from benchmarks.probe_chain import CHAINS
from benchmarks.probe_clients import LatentTask, draw_clients
from benchmarks.probe_federation import Trouble, federate
from benchmarks.probe_states import load_task, load_type

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="tiny")
    parser.add_argument("--clients", type=int, default=4, help="per type")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rules", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    task = load_task()
    here = present(args.family)
    if len(here) < 3:
        raise SystemExit(f"{args.family}: three backbones are needed, here are {', '.join(here)}")
    lab = Laboratory(task, [load_type(name, task) for name in here])
    tasks = lab.latent_tasks(lab.types, lab.align(lab.types, ALIGNMENT, METHOD))
    values: dict[str, Any] = {"seeds": seeds, "clients_per_type": args.clients}
    for kind in TROUBLES:
        row = values.setdefault(args.family, {}).setdefault(kind, {})
        plain = None
        for rule in args.rules:
            found = others_accuracy(lab, tasks, rule, kind, args.clients, seeds)
            row[rule] = round(float(found.mean()), 2)
            if plain is None:
                plain = found
            else:
                gain = found - plain
                row[f"{rule}.gain"] = round(float(gain.mean()), 2)
                row[f"{rule}.gain_se"] = round(float(gain.std(ddof=1) / len(gain) ** 0.5), 2)
            print(kind, rule, row[rule], row.get(f"{rule}.gain", ""), flush=True)
            write_results("conflict", values)
        if "cmga" in row:
            values[f"cmga_gain.{args.family}.{kind}"] = row["cmga.gain"]
    write_results("conflict", values)


if __name__ == "__main__":
    main()
