"""Controls and ablations: what happens to the gain when a part of the method is broken, left out or changed.

In the laboratory (:mod:`.alignment_probe`: frozen last-slot states, the product's arithmetic and its own aggregation
chains), 2 clients per type, each sharing at its own best learning rate, chosen on other seeds; gains over averaging
inside a type are paired, with their standard error over seeds. ``everyone smallest``: all clients own the smallest
backbone; the number to compare is what owners of larger backbones reach in the mixed federation (``larger_owners``).

Run: ``python -m benchmarks.ablations`` (minutes per backbone once, for the states; then about 15 minutes per family).
Writes ``benchmarks/results/ablations.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.alignment_probe import (
    ABLATIONS,
    ALIGNMENT,
    CONTROLS,
    FAMILIES,
    FIRST_SEED,
    METHOD,
    SCHEDULE,
    Laboratory,
    present,
)
from benchmarks.common import write_results
from benchmarks.probe_chain import STEPS
from benchmarks.probe_states import load_task, load_type

CLIENTS = 2


def rows() -> dict[str, dict[str, Any]]:
    """Name -> what differs from the recommended settings."""
    found: dict[str, dict[str, Any]] = {"as recommended": {}}
    found |= {f"control: {name}": {"alignment": {"control": name}} for name in CONTROLS}
    found |= ABLATIONS
    found |= {f"server: {name}": {"schedule": {"rule": name}} for name in STEPS}
    return found


def row(
    lab: Laboratory, types: list[Any], clients: int, seeds: list[int], options: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table."""
    found = lab.federated(
        types, clients, seeds,
        replace(ALIGNMENT, **options.get("alignment", {})),
        replace(METHOD, **options.get("method", {})),
        replace(SCHEDULE, **options.get("schedule", {})),
        replace(lab.task.data, **options.get("data", {})),
    )  # fmt: skip
    return {key: value for key, value in found.items() if key != "by_rate"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), default=["tiny", "real_mixed"]
    )
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    task = load_task()
    values: dict[str, Any] = {"seeds": seeds, "clients_per_type": CLIENTS}
    for family in args.families:
        here = present(family)
        if len(here) < 2:
            continue
        lab = Laboratory(task, [load_type(name, task) for name in here])
        table = values.setdefault(family, {})
        for name, options in rows().items():
            table[name] = row(lab, lab.types, CLIENTS, seeds, options)
            print(family, name, {k: v for k, v in table[name].items() if k != "types"}, flush=True)
            write_results("ablations", values)
        smallest = min(range(len(here)), key=lambda i: lab.types[i].pool.shape[1])
        alike = row(lab, [lab.types[smallest]], CLIENTS * len(here), seeds, {})
        larger = [
            own["across"]
            for name, own in table["as recommended"]["types"].items()
            if name != here[smallest]
        ]
        table["everyone smallest"] = {
            "within": alike["within"],
            "larger_owners": round(sum(larger) / len(larger), 2),
        }
        print(family, "everyone smallest", table["everyone smallest"], flush=True)
        write_results("ablations", values)


if __name__ == "__main__":
    main()
