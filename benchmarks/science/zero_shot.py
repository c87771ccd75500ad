"""Zero-shot transfer: what some model types learnt, in a backbone that never took part.

In the laboratory (:mod:`.laboratory`: frozen last-slot states, the product's arithmetic). Every type in turn stays
out (``types.*.guest`` of a run): the others train as the strategy ``heterotune`` (the headline's 10 rounds), the one
left out only computes its maps from public texts, takes the bank, and fits what the others predict of public texts.
``bank``: the bank alone, shared to the end, without any predictions, for those who take part as well. The share of its
own federated gain is ``(zero-shot - bare) / (taking part - bare)``, each at the learning rate that is best for those
who train. ``--anchors``: which public texts the maps are computed from; ``debian-near`` holds texts of the task's
kind, ``debian-other``, the default of a run, does not.

Run: ``python -m benchmarks.science.zero_shot`` (minutes per backbone once, then minutes per family).
``share_of_own_gain`` in the results is the lowest of the families' means with ``debian-other``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from benchmarks.runner import read_results, say, write_results
from benchmarks.science.laboratory.clients import Schedule, draw_clients
from benchmarks.science.laboratory.federation import federate, zero_shot
from benchmarks.science.laboratory.rows import (
    ALIGNMENT,
    FAMILIES,
    METHOD,
    SCHEDULE,
    TYPE_PHASE,
    Laboratory,
    arguments,
    laboratories,
    seeds_of,
)
from heterotune_flwr.alignment.public_texts import SHIPPED

_ANCHORS = ("debian-other", "debian-near")
_BANK = replace(SCHEDULE, rounds=10, rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), rule="cmga")
_SCHEDULES = {"heterotune": replace(_BANK, **TYPE_PHASE), "bank": _BANK}


def leave_out(
    lab: Laboratory, out: int, clients: int, seeds: list[int], anchors: str, schedule: Schedule
) -> dict[str, float]:
    """Accuracies of one type: bare, with the others' bank, and taking part (means over seeds, percent)."""
    alignment = replace(ALIGNMENT, anchors=anchors)
    tasks = lab.latent_tasks(lab.types, lab.align(lab.types, alignment, METHOD), anchors)
    found: dict[str, float] = {"bare": zero_shot([tasks[out]], lab.targets[1])[0]}
    others = [task for index, task in enumerate(tasks) if index != out]
    for name, members, guests in (
        ("zero_shot", others, [tasks[out]]),
        ("takes_part", [*others, tasks[out]], []),
    ):
        total = clients * len(members)
        shares = draw_clients(lab.task.data, total, seeds, lab.index)
        results = federate(
            members, lab.targets, shares, total, seeds, METHOD, schedule, ("across",), guests
        )
        rate = int(results["across"].mean(axis=(1, 2)).argmax())
        own = results["across"][rate][:, len(others) :: len(members)]
        reached = results["guests"][rate] if guests else own
        found[name] = float(reached.mean())
        found[f"{name}.se"] = float(reached.mean(axis=1).std(ddof=1) / np.sqrt(len(seeds)))
    share = (found["zero_shot"] - found["bare"]) / (found["takes_part"] - found["bare"])
    return {key: round(value, 2) for key, value in found.items()} | {
        "share_of_own_gain": round(share, 3)
    }


def main() -> None:
    parser = arguments(__doc__, ["tiny", "real_mixed"])
    parser.add_argument("--clients", type=int, default=4, help="per type")
    parser.add_argument("--anchors", nargs="+", choices=SHIPPED, default=[*_ANCHORS])
    parser.add_argument("--methods", nargs="+", choices=sorted(_SCHEDULES), default=[*_SCHEDULES])
    args = parser.parse_args()
    seeds = seeds_of(args)
    head = {"seeds": seeds, "clients_per_type": args.clients}
    if read_results("zero_shot").get("clients_per_type", args.clients) != args.clients:
        parser.error("zero_shot.json holds other --clients; remove it first")
    for family, lab in laboratories(args.families, args.anchors):
        for anchors, method in product(args.anchors, args.methods):
            rows = {
                name: leave_out(lab, i, args.clients, seeds, anchors, _SCHEDULES[method])
                for i, name in enumerate(lab.names)
            }
            name = family if anchors == _ANCHORS[0] else f"{family}.{anchors}"
            name += "" if method == "heterotune" else f".{method}"
            mean = round(float(np.mean([row["share_of_own_gain"] for row in rows.values()])), 3)
            say(name, mean, rows)
            write_results("zero_shot", {**head, name: rows, f"share_of_own_gain.{name}": mean})
    known = read_results("zero_shot")
    means = [known.get(f"share_of_own_gain.{family}") for family in FAMILIES]
    if found := [mean for mean in means if mean is not None]:
        write_results("zero_shot", {**head, "share_of_own_gain": min(found)})


if __name__ == "__main__":
    main()
