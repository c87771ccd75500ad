"""Every fault on every shipped strategy, two hostile clients of ten: does the server survive, and what does it cost?

Hostile is what leaves the client (``tests/faults/wire_faults.py``); the same run with those two clients absent is what
a case is compared with. Toy clients on the real wire contract. Writes ``benchmarks/results/faults.json``::

    python -m benchmarks.faults

"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from heterotune_flwr.exchange.storage import atomic_write_text

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "faults"), str(TESTS)]


def play_strategy(strategy: str) -> list[dict[str, Any]]:
    """All cases of one strategy."""
    from fault_cases import matrix, play

    logging.getLogger("flwr").setLevel(logging.ERROR)
    return [play(*case).to_json() for case in matrix() if case[0] == strategy]


def by_fault(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per fault: cases, survived, detected, largest gap."""
    table: dict[str, dict[str, Any]] = {}
    for fault in dict.fromkeys(row["fault"] for row in rows):
        cases = [row for row in rows if row["fault"] == fault]
        table[fault] = {
            "cases": len(cases),
            "survived": sum(row["survived"] for row in cases),
            "detected": sum(row["detected"] for row in cases),
            "max_loss_gap_percent": round(max(row["gap_percent"] for row in cases), 4),
        }
    return table


def main(workers: int) -> dict[str, Any]:
    """Play the whole matrix."""
    from fault_cases import ROUNDS
    from fault_federation import SHIPPED

    rows: list[dict[str, Any]] = []
    with multiprocessing.Pool(workers) as pool:
        for strategy, done in zip(SHIPPED, pool.imap(play_strategy, SHIPPED), strict=True):
            sys.stdout.write(f"{strategy}: {len(done)} cases\n")
            sys.stdout.flush()
            rows += done
    detected = [row for row in rows if row["detected"]]
    return {
        "command": "python -m benchmarks.faults",
        "machine": machine(),
        "strategies": len(SHIPPED),
        "clients": 10,
        "hostile": 2,
        "rounds": ROUNDS,
        "cases": len(rows),
        "survived": sum(row["survived"] for row in rows),
        "detected": len(detected),
        "max_loss_gap_percent": round(max(row["gap_percent"] for row in detected), 4),
        "by_fault": by_fault(rows),
        "rows": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    outcome = main(parser.parse_args().workers)
    path = Path(__file__).parent / "results" / "faults.json"
    atomic_write_text(path, json.dumps(outcome, indent=1) + "\n")
    flat = {key: value for key, value in outcome.items() if key != "rows"}
    sys.stdout.write(json.dumps(flat, indent=2) + "\n")
