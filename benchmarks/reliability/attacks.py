"""What attackers reach against the program as it ships, several seeds each.

    python -m benchmarks.reliability.attacks [--seeds 0 1 2] [--only node run roster]

``node``: a server that wants to read a node's environment, labels and texts (:mod:`.attack_node`). ``run``: lying
clients against the models of the others (:mod:`.attack_run`). ``roster``: lies before round 1, and a poisoned cache of
alignment factors (:mod:`.attack_roster`). Points are of accuracy, drops paired by seed, of the worst type;
``*_adaptive`` attacks know the bounds and stay inside them, and ``backdoor_success`` is no lie at all: they are told,
not bounded.
"""

from __future__ import annotations

import importlib

from benchmarks.runner import arguments, read_results, say, write_results

PARTS = ("run", "roster", "node")


def main() -> None:
    """Run the parts one after the other; each is written when it is done, others' numbers of the same seeds stay."""
    parser = arguments(__doc__, (0, 1, 2))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    for part in args.only:
        say(f"{part} ...")
        found = importlib.import_module(f"benchmarks.reliability.attack_{part}").run(args.seeds)
        others = read_results("attacks").get("seeds") != args.seeds
        write_results("attacks", {"seeds": args.seeds, **found}, anew=others)
        say({name: value for name, value in found.items() if not isinstance(value, dict)})


if __name__ == "__main__":
    main()
