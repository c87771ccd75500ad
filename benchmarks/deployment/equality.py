"""A deployment with real backbones gives the bank that the simulation of the same clients gives.

SmolLM2-135M at 4 bits (nf4), Gemma-3-270M at 8 (int8) and an embedded tiny one at 16 (bf16), a node each, over TLS with
node authentication; the same seed and the same examples per client as in the simulation, which runs in this process.
Every node has a cache of its own, in which it finds the weights and nothing else: what it computes with them (frozen
states, factors for the alignment) is not the simulation's.

Run: ``heterotune fetch smollm2``, ``heterotune fetch gemma3-270m --accept-gemma-terms``, then
``OMP_NUM_THREADS=1 python -m benchmarks.deployment.equality`` (about 10 minutes).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.deployment.lab import Lab, end_on_sigterm, has_nginx
from benchmarks.deployment.runs import (
    NODES,
    Brought,
    configuration,
    final_bank,
    greatest_difference,
    join,
    simulated_bank,
)
from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app

BACKBONES = (("smollm2", "nf4"), ("gemma3-270m", "int8"), ("tiny-b", "bf16"))
TYPES = ", ".join(f"{{backbone: {name}, bits: {bits}, clients: 1}}" for name, bits in BACKBONES)


def own_cache(folder: Path) -> Path:
    """A cache with the fetched and the quantized weights, and nothing that was computed with them."""
    folder.mkdir(parents=True)
    for part in ("backbones", "store"):
        if (cache_dir() / part).is_dir():
            (folder / part).symlink_to(cache_dir() / part)
    return folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for logs and run directories")
    options = parser.parse_args()
    end_on_sigterm()
    types = f"[{TYPES}]"
    brought: Brought = dict(zip(NODES, BACKBONES, strict=True))
    with tempfile.TemporaryDirectory(prefix="heterotune-equal-") as name:
        folder = options.keep or Path(name)
        config, simulated = simulated_bank(folder / "simulated", options.rounds, types, brought)
        with Lab(folder, list(NODES), proxy=has_nginx()) as lab:
            for node in NODES:
                lab.configure(node, cache=str(own_cache(folder / f"cache-{node}")))
            join(lab, config, brought, books=folder / "books")
            text = configuration(folder / "deployed", options.rounds, types)
            verdict = lab.await_end(lab.submit(stage_app(folder / "app"), config=text), 1800)
            if verdict != "finished:completed":
                raise SystemExit(f"the deployed run: {verdict}\n{lab.everything()}")
    deployed = final_bank(folder / "deployed")
    events = read_events(folder / "deployed" / "rounds.jsonl")
    described = next(event for event in events if event["event"] == "describe")
    values = {
        "sim_equals_deploy_real": greatest_difference(deployed, simulated),
        "sim_equals_deploy_real_types": sorted(described["types"]),
        "sim_equals_deploy_real_rounds": options.rounds,
        "sim_equals_deploy_real_largest": max(
            float(np.max(np.abs(value))) for value in simulated.values()
        ),
    }
    say(values)
    write_results("deployment", values)


if __name__ == "__main__":
    main()
