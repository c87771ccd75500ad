"""Where sharing across types pays and where it does not: a map over clients, examples, skew and types.

In the laboratory (:mod:`.laboratory`: frozen last-slot states, the product's arithmetic), one dial at a time
around the demonstration (2 clients per type, 96 examples each, Dirichlet 0.3), 10 rounds as in the headline, each
sharing at its own best learning rate, chosen on other seeds. Across types: the bank, then the type phase. Gains are
paired, with their standard error over seeds.

Run: ``python -m benchmarks.science.sweep`` (minutes per backbone once, then about 10 minutes per family).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.runner import say, write_results
from benchmarks.science.laboratory.rows import TYPE_PHASE, arguments, laboratories, seeds_of

CLIENTS = (1, 2, 4, 8)
EXAMPLES = (16, 32, 96, 256, 512)
ALPHAS = (0.05, 0.1, 0.3, 1.0, 10.0)
SCHEDULE = {"rounds": 10, "rates": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), **TYPE_PHASE}


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
    args = arguments(__doc__, ["real_mixed", "tiny_five"]).parse_args()
    seeds = seeds_of(args)
    for family, lab in laboratories(args.families):
        gains = []
        for name, kinds, clients, data in points(len(lab.types)):
            row = lab.row(lab.types[:kinds], clients, seeds, schedule=SCHEDULE, data=data)
            row = {key: value for key, value in row.items() if key not in ("by_rate", "types")}
            gains.append(row["gain_over_within"])
            say(family, name, row)
            write_results("sweep", {"seeds": seeds, family: {name: row}})
        ends = {f"smallest_gain.{family}": min(gains), f"largest_gain.{family}": max(gains)}
        write_results("sweep", {"seeds": seeds, **ends})


if __name__ == "__main__":
    main()
