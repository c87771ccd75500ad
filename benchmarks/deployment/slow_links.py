"""Time per round over a fast link and over a slow, long, lossy one: HeteroTune and LoRA r=16 on the same nodes.

Three nodes with one real backbone (SmolLM2-135M at 4 bits), each in a network namespace of its own, behind TLS, node
keys and nginx; two links (:mod:`.slow_network`):

* ``fast``: 50 MB/s, no loss;
* ``slow``: 1 Mbit/s, 200 ms from end to end (400 ms there and back), 2 % of the packets lost in either direction.

A method runs with its shipped settings at 16 bits per number, 12 steps of 16 examples a round. The time of a round is
from one ``round`` event of the journal to the next, so that the first, in which backbones are loaded, does not count;
what comes before it (who is there, alignment, the evaluation before training) is told beside it, and so is the mean
client's time for its steps (``training_s``). Links change under
running nodes: they find the server again by themselves.

Run as root: ``python -m benchmarks.deployment.slow_links`` (about an hour; ``--links fast --methods heterotune`` for a
part).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment.lab import Lab, end_on_sigterm
from benchmarks.deployment.runs import NODES, join
from benchmarks.deployment.slow_network import FAST, SERVER, SLOW, Link, Network, inside
from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.config.compose import compose
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app

LINKS = {"fast": FAST, "slow": SLOW}
#: Name in the results -> strategy.
METHODS = {"heterotune": "heterotune", "lora16": "fedit"}
_BY = "slow: packets paced, delayed and dropped in user space between TUN devices; fast: tc tbf"
_CLONE_NEWNET = 0x40000000
_RUN = """yaml:
groups: {types: tiny, data: debian_sections, method: dema, alignment: labels, train: small_data, exchange: bf16,
  server: deployment}
types: [{backbone: BACKBONE, bits: BITS, clients: 3}]
alignment: {cache: false}
server: {rounds: ROUNDS, evaluate_every: 0, min_clients: 3}
run: {name: links, dir: DIRECTORY, compare: [STRATEGY]}
"""


def configuration(
    directory: Path, strategy: str, rounds: int, backbone: str = "smollm2", bits: str = "nf4"
) -> str:
    """Inline YAML of a run."""
    values = {
        "STRATEGY": strategy, "ROUNDS": str(rounds), "DIRECTORY": str(directory), "BACKBONE": backbone, "BITS": bits,
    }  # fmt: skip
    text = _RUN
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def enter(namespace: str) -> None:
    """Go on in a network namespace: this thread, and what it starts from now on."""
    file = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    os.close(file)


def times(directory: Path) -> dict[str, Any]:
    """What a run's journal says of its rounds: seconds of each, and bytes on the wire per client and round."""
    events = read_events(directory / "rounds.jsonl")
    rounds = [event for event in events if event["event"] == "round"]
    ends = [event["time"] for event in rounds]
    sent = [e for e in events if e["event"] == "bytes" and e["message_type"] == "train"]
    later = [event for event in sent if event["round"] > 1]
    return {
        "round_s": [round(b - a, 1) for a, b in pairwise(ends)],
        "before_and_first_round_s": round(ends[0] - events[0]["time"], 1),
        "training_s": [round(event["client_seconds"], 1) for event in rounds[1:]],
        "clients": [event["clients"] for event in rounds],
        "bytes_down": round(median(event["wire_down"] for event in later)),
        "bytes_up": round(median(event["wire_up"] for event in later)),
        "failed": sum(event["event"] == "client_failed" for event in events),
    }


def measure(
    lab: Lab, network: Network, app: Path, link: Link, method: str, config: str, directory: Path
) -> dict[str, Any]:
    """One run over links of one kind."""
    network.link(link)
    lab.await_online(set(NODES))
    began = time.monotonic()
    run_id = lab.submit(app, config=config)
    verdict = lab.await_end(run_id, 4 * 3600)
    if verdict != "finished:completed":
        raise SystemExit(f"{method} over the {link.name} link: {verdict}\n{lab.everything()}")
    row = {"link": link.name, "method": method, **times(directory)}
    row |= {"seconds": round(time.monotonic() - began), "packets": network.traffic()}
    say(row)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--links", nargs="*", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", nargs=2, default=["smollm2", "nf4"], help="name and bits")
    parser.add_argument("--congestion", default="cubic", help="TCP's congestion control")
    parser.add_argument("--keep", type=Path, help="folder for logs and run directories")
    options = parser.parse_args()
    end_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="heterotune-links-") as name,
        Network(list(NODES), options.congestion) as network,
    ):
        folder = options.keep or Path(name)
        network.link(FAST)
        enter(network.server)
        some = configuration(folder, "heterotune", 1, *options.backbone)
        with Lab(folder, list(NODES), proxy=True, host=SERVER) as lab:
            brought = dict.fromkeys(NODES, tuple(options.backbone))
            join(lab, compose(some), brought, lambda name: inside(network.node(name)))
            app = stage_app(folder / "app")
            for link in options.links:
                for method in options.methods:
                    directory = folder / f"{link}-{method}"
                    config = configuration(
                        directory, METHODS[method], options.rounds, *options.backbone
                    )
                    row = measure(lab, network, app, LINKS[link], method, config, directory)
                    values = {
                        f"{link}_link_round_s.{method}": round(median(row["round_s"]), 1),
                        "links": {f"{link}.{method}": row},
                        "links_backbone": " ".join(options.backbone),
                        "links_congestion": options.congestion,
                        "links_by": _BY,
                    }
                    write_results("deployment", values)


if __name__ == "__main__":
    main()
