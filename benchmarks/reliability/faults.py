"""Every fault on every shipped strategy, two hostile clients of ten: does the server survive, and what does it cost?

Hostile is what leaves the client (``tests/faults/wire_faults.py``); the same run with those two clients absent is what
a case is compared with. Toy clients on the real wire contract.

Run: ``python -m benchmarks.reliability.faults`` (a quarter of an hour).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from typing import Any

from benchmarks.runner import arguments, say, use_test_helpers, write_results

use_test_helpers("faults")


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


def main() -> None:
    from fault_cases import ROUNDS
    from fault_federation import SHIPPED

    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", choices=SHIPPED, help="some are not written")
    args = parser.parse_args()
    chosen = args.strategies or list(SHIPPED)
    rows: list[dict[str, Any]] = []
    with multiprocessing.Pool(args.workers) as pool:
        for strategy, done in zip(chosen, pool.imap(play_strategy, chosen), strict=True):
            say(f"{strategy}: {len(done)} cases")
            rows += done
    found = {
        "strategies": len(chosen),
        "clients": 10,
        "hostile": 2,
        "rounds": ROUNDS,
        "cases": len(rows),
        "survived": sum(row["survived"] for row in rows),
        "detected": sum(row["detected"] for row in rows),
        "max_loss_gap_percent": round(max(r["gap_percent"] for r in rows if r["detected"]), 4),
        "by_fault": by_fault(rows),
    }
    say(json.dumps(found, indent=1))
    if not args.strategies:
        write_results("faults", {**found, "rows": rows}, anew=True)


if __name__ == "__main__":
    main()
