"""A deployed client with a warm worker of its own, and its end."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from tiny_backbones import LABELS

from benchmarks.deployment.runs import give_book
from client_app.app import app
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.flower import Context, Message, RecordDict, identify_process
from heterotune_flwr.protocol.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.worker.cli import ask_status
from heterotune_flwr.worker.places import Place

LORA = MethodConfig(kind="lora", lora_rank=2, output=3)


CONFIG = f"""yaml:
types: [{{backbone: tiny-a, bits: bf16, clients: 1}}]
data: {{name: own, labels: [{", ".join(LABELS)}], personal_test_examples: 4}}
train: {{batch_size: 4}}
strategies: {{}}
"""


#: Seconds of training, so that something can happen in the middle of it.
LONG = 120


class Node:
    """A deployed client; ``state`` is its state directory."""

    def __init__(self, folder: Path, name: str = "state", **settings: object) -> None:
        self.state = folder / name
        give_book(folder / "books", "hospital-7", self.state)  # nodes that are compared draw alike
        self.config = {
            "client-id": "hospital-7", "backbone": "tiny-a", "bits": "bf16",
            "data": str(folder / "data.jsonl"), "state-dir": str(self.state),
            "floor-step-examples": 4, "floor-round-examples": 8, **settings,
        }  # fmt: skip

    @property
    def place(self) -> Place:
        return Place.of(self.state)

    def ask(self, kind: str, content: RecordDict) -> RecordDict:
        identify_process()
        context = Context(
            run_id=5, node_id=77, node_config=self.config, state=RecordDict(),
            run_config={"config": CONFIG, "overrides": ""},
        )  # fmt: skip
        return app(Message(content, 77, kind, group_id="1"), context).content

    def describe(self) -> DescribeReply:
        request = DescribeRequest(Header("run", 0, LORA))
        return DescribeReply.from_content(self.ask(DESCRIBE, request.to_content()))

    def header(self, round: int, steps: int = 3) -> Header:
        work = TrainConfig(batch_size=4, local_steps=steps, learning_rate=0.01)
        return Header("run", 0, LORA, round, work)

    def train(self, round: int = 1, steps: int = 3, **values) -> TrainReply:
        request = TrainRequest(self.header(round, steps), values, "", None, [])
        return TrainReply.from_content(self.ask(TRAIN, request.to_content("fp32")))

    def evaluate(self, round: int = 1) -> dict[str, float]:
        request = EvaluateRequest(self.header(round), {}, "", None, ["personal"])
        return EvaluateReply.from_content(self.ask(EVALUATE, request.to_content("fp32"))).metrics

    def tensors(self) -> dict[str, np.ndarray]:
        return load_tensors(self.state / "clients" / "run" / "hospital-7.safetensors")

    def workers(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "heterotune_flwr.worker" in line and str(self.state) in line:
                    found += [process.pid] if process.status() != psutil.STATUS_ZOMBIE else []
        return found

    def status(self) -> dict:
        status = ask_status(self.place)
        assert status is not None
        return status

    def log(self) -> str:
        return (self.state / "worker.log").read_text()

    def await_running(self, kind: str = "train") -> int:
        """Wait until a message of this kind is at work; the worker's pid."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            status = ask_status(self.place)
            job = status and status["current"]
            if job and (job["type"], job["state"]) == (kind, "running"):
                return status["pid"]
            time.sleep(0.05)
        raise AssertionError("no job is running")


def end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        process.wait(10)
