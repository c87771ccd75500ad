"""Where sharing across types pays and where it does not: a map over clients, examples, skew and types.

In the laboratory (:mod:`.alignment_probe`: frozen last-slot states, the product's arithmetic), one dial at a time
around the demonstration (2 clients per type, 96 examples each, Dirichlet 0.3), 10 rounds as in the headline, each
sharing at its own best learning rate, chosen on other seeds. Across types: the bank, then the type phase. Gains are
paired, with their standard error over seeds.

Run: ``python -m benchmarks.sweep`` (minutes per backbone once, for the states; then about 10 minutes per family).
Writes ``benchmarks/results/sweep.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.alignment_probe import (
    ALIGNMENT,
    FAMILIES,
    FIRST_SEED,
    METHOD,
    SCHEDULE,
    TYPE_PHASE,
    Laboratory,
    present,
)
from benchmarks.common import write_results
from benchmarks.probe_states import load_task, load_type

CLIENTS = (1, 2, 4, 8)
EXAMPLES = (16, 32, 96, 256, 512)
ALPHAS = (0.05, 0.1, 0.3, 1.0, 10.0)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def points(types: int) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """(name, types, clients per type, what differs in the data)."""
    for clients in CLIENTS:
        yield f"{clients} clients per type", types, clients, {}
    for examples in EXAMPLES:
        yield f"{examples} examples per client", types, 2, {"examples_per_client": examples}
    for alpha in ALPHAS:
        yield f"Dirichlet {alpha:g}", types, 2, {"alpha": alpha}
    for kinds in range(2, types + 1):
        yield f"{kinds} types", kinds, 2, {}
        yield f"{kinds} types, 1 client each", kinds, 1, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=["real_mixed", "tiny_five"]
    )
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    task = load_task()
    values: dict[str, Any] = {"seeds": seeds}
    schedule = replace(SCHEDULE, rounds=10, rates=RATES, **TYPE_PHASE)
    for family in args.families:
        here = present(family)
        if len(here) < 2:
            continue
        lab = Laboratory(task, [load_type(name, task) for name in here])
        table = values.setdefault(family, {})
        for name, kinds, clients, data in points(len(here)):
            row = lab.federated(
                lab.types[:kinds],
                clients,
                seeds,
                ALIGNMENT,
                METHOD,
                schedule,
                replace(task.data, **data),
            )
            table[name] = {
                key: value for key, value in row.items() if key not in ("by_rate", "types")
            }
            print(family, name, table[name], flush=True)
            write_results("sweep", values)
        gains = [row["gain_over_within"] for row in table.values()]
        values[f"smallest_gain.{family}"], values[f"largest_gain.{family}"] = min(gains), max(gains)
        write_results("sweep", values)


if __name__ == "__main__":
    main()
