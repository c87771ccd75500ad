"""The mixture over reach: private, federated and bare model under a gate, against the choice of one of them.

Own data of three cases (:mod:`.own_cases`), each federation run once. A client's experts add to its final states: the
one trained alone, and the federated one. What they add is weighed by a gate ``y = x + a u_alone + f u_federated``,
fitted on the client's choosing set, and nowhere else; every row below is measured on its own test and on the common
test of all clients' tasks. Rows:

``switch``: one of bare, alone, federated, by the product's rule. ``stopped``: alone, after as many rounds as are
best. ``continued``: federated, then up to two own rounds; ``kept``: this in the federated one's place, as the product
has it. ``gate``: both weights and what is left to the bare model, 0 to 1 together; of labels also how much of class
statistics and label frequencies acts. ``gate_alone``: the same without the federated expert. ``gate_by_input``: weights
that depend on how far each expert moves a state. ``mixed``: weights that sum to one, in the federated one's place in
the switch. ``gated``: the gate in that place, judged on each fifth of the choosing set by weights fitted on the rest.

    python -m benchmarks.science.reach --seeds 20 --instructions FILE.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.runner import (
    SEEDS,
    Cells,
    add_instructions,
    arguments,
    in_own_process,
    paired_gain,
    say,
    write_results,
)
from benchmarks.science.laboratory.reach_client import Reach
from benchmarks.science.no_harm import federation, paired, worse
from benchmarks.science.own_cases import CASES
from heterotune_flwr.protocol.metrics import ALONE, BARE, FEDERATED

ROWS = (
    BARE, ALONE, FEDERATED, "switch", "stopped", "continued", "gate", "gate_alone", "gate_by_input", "mixed",
    "gated", "kept",
)  # fmt: skip
_CELLS = "reach_cells"


def main() -> None:
    """Measure the cells that are missing, and write what all of them come to."""
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=50, help="generated per client and test")
    parser.add_argument("--keep", type=Path, help="a folder in which the federations are kept")
    add_instructions(parser)
    parser.add_argument("--cell", nargs=2, metavar=("CASE", "SEED"), help="one, as JSON")
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(cell(given.cell[0], int(given.cell[1]), given)))
        return
    cells = Cells(_CELLS)
    asked = [(f"{case} {seed}", case, seed) for seed in given.seeds for case in given.cases]
    for name, case, seed in asked:
        if name not in cells.read():
            words = ["--rounds", str(given.rounds), "--answers", str(given.answers)]
            words += ["--cell", case, str(seed)]
            for option in ("instructions", "keep"):
                if getattr(given, option):
                    words += [f"--{option}", str(getattr(given, option))]
            cells.keep({name: in_own_process("benchmarks.science.reach", *words)})
        known = cells.read()
        say(name, summary({name: known[name]})["all"]["own"])
        asked_for = {each: known[each] for each, _, _ in asked if each in known}
        missing = [each for each, _, _ in asked if each not in known]
        write_results("reach", summary(asked_for) | {"missing": missing}, anew=True)


def cell(case: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run HeteroTune on a case once; client -> every row on its own test and on all tasks."""
    kept = given.keep / f"{case}-{seed}" if given.keep else None
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    place = tempfile.TemporaryDirectory(prefix="heterotune-benchmark-")
    with nullcontext(str(kept)) if kept else place as folder:
        found = federation(
            case, "tiny", seed, Path(folder), given.rounds, given.instructions, "data.generate=0"
        )
        return {r.client_id: measured(Reach(client, r, given.answers)) for client, r in found}


# ------------------------------------------------------------------------------------ a client


def measured(client: Reach) -> dict[str, Any]:
    """Every row's loss and score on the own test and on all tasks, and how it does against others on the own one."""
    ways = client.ways()
    own, common = client.measured(ways, "personal"), client.measured(ways, "global")
    pairs = {
        f"{name} {other}": {
            "loss": paired(own[other][0] - own[name][0]),
            "score": paired(own[name][1] - own[other][1]),
        }
        for name in ROWS
        for other in (BARE, ALONE, "switch")
        if name != other
    }
    return {
        "type": client.kept.type_key,
        "took": client.took,
        "own": _means(own),
        "all": _means(common),
        "gain": pairs,
        "weights": {
            n: [round(w, 3) for w in way.weights] for n, way in ways.items() if way.weights
        },
    }


def _means(results: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[str, float]]:
    return {
        "loss": {name: round(float(losses.mean()), 4) for name, (losses, _) in results.items()},
        "score": {name: round(100 * float(s.mean()), 2) for name, (_, s) in results.items()},
    }


# ------------------------------------------------------------------------------------ all of them


def summary(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over clients of every row, its gain over the switch, and whom it harms; of everything, and by case."""
    groups: dict[str, dict[tuple[int, str, str], Any]] = {}
    for name, clients in cells.items():
        case, seed = name.split()
        for group in ("all", case):
            groups.setdefault(group, {}).update(
                {(int(seed), f"{case} {c['type']}", f"{name} {cid}"): c for cid, c in clients.items()}
            )  # fmt: skip
    return {group: _group(clients) for group, clients in sorted(groups.items())} | {
        "seeds": sorted({int(name.split()[1]) for name in cells}), "cells": sorted(cells),
    }  # fmt: skip


def _group(clients: Mapping[tuple[int, str, str], Any]) -> dict[str, Any]:
    def mean(test: str, measure: str, row: str) -> float:
        return round(statistics.fmean(c[test][measure][row] for c in clients.values()), 3)

    def gain(test: str, measure: str, row: str) -> dict[str, float]:
        """Over the switch: less loss, or a higher score."""
        ours, theirs = (
            {key: (1 if measure == "score" else -1) * c[test][measure][name] for key, c in clients.items()}
            for name in (row, "switch")
        )  # fmt: skip
        return paired_gain(ours, theirs)

    found: dict[str, Any] = {"clients": len(clients)}
    for test in ("own", "all"):
        found[test] = {
            row: {m: mean(test, m, row) for m in ("loss", "score")} | {
                f"{m}_gain": gain(test, m, row) for m in ("loss", "score") if row != "switch"
            }
            for row in ROWS
        }  # fmt: skip
    for row in ROWS:
        for other in (BARE, ALONE):
            as_taken = {key[2]: {**client, "took": row} for key, client in clients.items()}
            harmed = {c for measure in ("loss", "score") for c in worse(as_taken, other, measure)}
            found["own"][row][f"worse_than_{other}"] = sorted(harmed)
    found["took"] = {
        name: sum(c["took"] == name for c in clients.values()) for name in (BARE, ALONE, FEDERATED)
    }
    for row, count in (("gate", 2), ("gate_alone", 1), ("mixed", 2)):
        weights = [c["weights"][row][:count] for c in clients.values() if row in c["weights"]]
        found["own"][row]["weights"] = [
            round(statistics.fmean(e), 3) for e in zip(*weights, strict=True)
        ]
    return found


if __name__ == "__main__":
    main()
