"""Controls and ablations: what happens to the gain when a part of the method is broken, left out or changed.

In the laboratory (:mod:`.laboratory`: frozen last-slot states, the product's arithmetic), 2 clients per type, each
sharing at its own best learning rate, chosen on other seeds. Gains over averaging inside a type are paired, with their
standard error over seeds. ``everyone smallest``: all clients own the smallest backbone; the number to compare is what
owners of larger backbones reach in the mixed federation (``larger_owners``).

Run: ``python -m benchmarks.science.ablations`` (minutes per backbone once, then about 15 minutes per family).
"""

from __future__ import annotations

from typing import Any

from benchmarks.runner import say, write_results
from benchmarks.science.laboratory.rows import (
    ABLATIONS,
    CONTROLS,
    Laboratory,
    arguments,
    laboratories,
    seeds_of,
)

CLIENTS = 2


def rows() -> dict[str, dict[str, Any]]:
    """Name -> what differs from the recommended settings."""
    found: dict[str, dict[str, Any]] = {"as recommended": {}}
    found |= {f"control: {name}": {"alignment": {"control": name}} for name in CONTROLS}
    return found | ABLATIONS


def everyone_smallest(lab: Laboratory, seeds: list[int], mixed: dict[str, Any]) -> dict[str, float]:
    """All clients on the smallest backbone, and what owners of larger ones have in the mixed federation."""
    smallest = min(lab.types, key=lambda own: own.pool.shape[1])
    alike = lab.row([smallest], CLIENTS * len(lab.types), seeds)
    larger = [own["across"] for name, own in mixed["types"].items() if name != smallest.name]
    return {"within": alike["within"], "larger_owners": round(sum(larger) / len(larger), 2)}


def main() -> None:
    args = arguments(__doc__, ["tiny", "real_mixed"]).parse_args()
    seeds = seeds_of(args)
    for family, lab in laboratories(args.families):

        def keep(name: str, row: dict[str, Any], family: str = family) -> None:
            say(family, name, {k: v for k, v in row.items() if k != "types"})
            write_results(
                "ablations", {"seeds": seeds, "clients_per_type": CLIENTS, family: {name: row}}
            )

        found: dict[str, dict[str, Any]] = {}
        for name, options in rows().items():
            row = lab.row(lab.types, CLIENTS, seeds, **options)
            found[name] = {key: value for key, value in row.items() if key != "by_rate"}
            keep(name, found[name])
        keep("everyone smallest", everyone_smallest(lab, seeds, found["as recommended"]))


if __name__ == "__main__":
    main()
