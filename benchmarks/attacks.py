"""What attackers reach against the program as it ships, several seeds each; writes ``benchmarks/results/attacks.json``.

    python -m benchmarks.attacks [--seeds 0 1 2] [--only node run roster]

``node``: a server that wants to read a node's environment, labels and texts (:mod:`.attack_node`). ``run``: lying
clients against the models of the others (:mod:`.attack_run`). ``roster``: lies before round 1, and a poisoned cache of
alignment factors (:mod:`.attack_roster`). Points are of accuracy, drops paired by seed, of the worst type;
``*_adaptive`` attacks know the bounds and stay inside them, and ``backdoor_success`` is no lie at all: they are told,
not bounded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.common import RESULTS, machine
from heterotune_flwr.exchange.storage import atomic_write_text

PARTS = ("run", "roster", "node")


def say(line: str) -> None:
    """Print at once: some parts take minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(seeds: list[int], only: list[str], path: Path) -> None:
    """Run the parts one after the other; each is written when it is done, others' numbers of the same seeds stay."""
    known = json.loads(path.read_text()) if path.exists() else {}
    results = known if known.get("seeds") == seeds else {}
    for part in only:
        say(f"{part} ...")
        results |= importlib.import_module(f"benchmarks.attack_{part}").run(seeds)
        results |= {
            "command": "python -m benchmarks.attacks",
            "machine": machine(),
            "seeds": seeds,
        }
        atomic_write_text(path, json.dumps(results, indent=1) + "\n")
    say(json.dumps({k: v for k, v in results.items() if not isinstance(v, dict)}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.only, RESULTS / "attacks.json")
