"""What the warm worker saves a deployed client: seconds from a process's start to its first training step.

``python -m benchmarks.speed.warm_worker`` (SmolLM2-135M nf4, about three minutes on two cores; it must be in the
cache: ``heterotune fetch smollm2``), or ``--backbone tiny-c --bits bf16`` for a quick look that writes nothing.

Each train message gets a fresh process, as Flower starts one: (a) ``worker=off``, the process imports torch,
loads the backbone and trains; (b) the worker trains, which has had one message before. Both import what
Flower's own ClientApp process imports. Measured: from the start of the process to its reply, less the seconds
of the training steps that the reply reports; what comes after the steps (private state to disk, reply
packed) is in it, for both. The frozen last-slot states of the examples lie in the disk cache for both; (a)
reads them from there, (b) has them in memory. Without that cache (a) would also compute them each time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.backbones.sources import describe_source
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.flower import content_from_bytes, content_to_bytes
from heterotune_flwr.protocol.messages import TRAIN, Header, TrainReply, TrainRequest
from heterotune_flwr.schema import DataConfig, MethodConfig, TrainConfig
from heterotune_flwr.worker.cli import ask_status
from heterotune_flwr.worker.link import find
from heterotune_flwr.worker.places import Place

EXAMPLES, STEPS, OUTPUT = 64, 10, 16
METHOD = MethodConfig(output=OUTPUT)
CHILD = """
import json, sys, time
import flwr.supernode.runtime.run_clientapp  # what Flower's own process imports
from client_app.app import app
from heterotune_flwr.flower import Context, Message, RecordDict
from heterotune_flwr.flower import content_from_bytes, content_to_bytes, identify_process
identify_process()
settings = json.load(open(sys.argv[1]))
context = Context(run_id=1, node_id=1, state=RecordDict(), **settings)
content = content_from_bytes(open(sys.argv[2], "rb").read())
reply = app(Message(content, 1, "train", group_id="1"), context)
ended = time.time()
open(sys.argv[3], "wb").write(content_to_bytes(reply.content))
loading = sys.modules.get("heterotune_flwr.backbones.loading")
print(json.dumps({"ended": ended, "loads": len(loading._loaded) if loading else 0}))
"""


@dataclass
class Node:
    """A deployed client whose messages each get a fresh process."""

    folder: Path
    config: dict[str, Any]
    backbone: str
    bits: str

    def train(self, round: int) -> tuple[float, int]:
        """Send one message; returns (seconds before the first step, backbones the process loaded)."""
        self.folder.mkdir(exist_ok=True)
        settings, request, reply = (self.folder / n for n in ("node.json", "request", "reply"))
        run = f"yaml:\ntypes: [{{backbone: {self.backbone}, bits: {self.bits}, clients: 1}}]\nstrategies: {{}}\n"
        settings.write_text(
            json.dumps({"node_config": self.config, "run_config": {"config": run, "overrides": ""}})
        )
        request.write_bytes(self._message(round))
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, settings, request, reply],
            stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
        told = json.loads(done.stdout.splitlines()[-1])
        report = TrainReply.from_content(content_from_bytes(reply.read_bytes()))
        assert report.metrics["steps"] == STEPS
        return told["ended"] - started - report.metrics["seconds"], told["loads"]

    def _message(self, round: int) -> bytes:
        """A train message as the server sends it: the maps with the first one only."""
        rng = np.random.default_rng(0)
        hidden = describe_source(self.backbone).hidden
        shapes = {"down.weight": (METHOD.latent, hidden), "down.bias": (METHOD.latent,),
                  "up.weight": (hidden, OUTPUT)}  # fmt: skip
        maps = {
            f"slots.0.map.{name}": (rng.standard_normal(shape) / 16).astype(np.float32)
            for name, shape in shapes.items()
        }
        first = maps if round == 1 else None
        train = TrainConfig(local_steps=STEPS, learning_rate=1e-3)
        header = Header("warm-worker", 0, METHOD, round, train)
        request = TrainRequest(header, {}, tensor_digest(maps), first, [])
        return content_to_bytes(request.to_content("fp32"))


def measure(node: Node, messages: int) -> tuple[list[float], int]:
    """Seconds of each message after the first, and backbones loaded by their own processes."""
    node.train(1)
    rounds = [node.train(round) for round in range(2, messages + 2)]
    return [round(seconds, 3) for seconds, _ in rounds], sum(loads for _, loads in rounds)


def compare(folder: Path, backbone: str, bits: str, messages: int) -> dict[str, Any]:
    """Fresh processes without and with the worker, one after the other."""
    rows = [{"text": e.text, "label": e.label} for e in training_pool(DataConfig())[:EXAMPLES]]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nodes = {}
    for worker in ("off", "on"):
        config = {"client-id": "c", "backbone": backbone, "bits": bits, "data": str(data),
                  "state-dir": str(folder / worker / "state"), "worker": worker}  # fmt: skip
        nodes[worker] = Node(folder / worker, config, backbone, bits)
    os.environ.pop("HETEROTUNE_WORKER", None)
    cold, cold_loads = measure(nodes["off"], messages)
    place = Place.of(nodes["on"].config["state-dir"])
    try:
        warm, thin_loads = measure(nodes["on"], messages)
        status = ask_status(place)
        assert status is not None
        assert status["jobs_done"] == messages + 1
        assert thin_loads == 0
    finally:
        link = find(place)
        if link is not None:
            with link:
                link.retire("the benchmark is over")
    cold_median, warm_median = statistics.median(cold), statistics.median(warm)
    ((type_key, loads),) = status["loads"].items()
    return {
        "warm_first_step_speedup": round(cold_median / warm_median, 2),
        "cold_first_step_seconds": cold_median,
        "warm_first_step_seconds": warm_median,
        "worker_backbone_loads": loads["loads"],
        "warm_worker": {
            "type": type_key,
            "message": TRAIN,
            "messages": messages,
            "cold_seconds": cold,
            "warm_seconds": warm,
            "cold_backbone_loads": cold_loads,
            "worker_weight_bytes_read": loads["bytes"],
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--bits", default="nf4")
    parser.add_argument("--messages", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="heterotune-benchmark-") as folder:
        values = compare(Path(folder), options.backbone, options.bits, options.messages)
    say(json.dumps(values, indent=2))
    if (options.backbone, options.bits) == ("smollm2", "nf4"):
        write_results("client_speed", values)


if __name__ == "__main__":
    main()
