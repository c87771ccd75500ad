"""Four real clients of two tiny backbones, answering in this process, and runs of shipped strategies on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import Message
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
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.tuning.state_cache import forget_states

METHOD = MethodConfig(latent=8, inner=4, output=3, experts_global=3)


LORA = MethodConfig(kind="lora", lora_rank=2, output=3)


#: Of an owner whose node takes part in runs as small as these.
LOW_FLOORS = {"floor-step-examples": 4, "floor-round-examples": 8, "floor-test-examples": 4}


class World:
    """Four simulated clients of two types, answering in this process."""

    def __init__(
        self, path: Path, config: str | None = None, overrides: str = "", **node_config: object
    ) -> None:
        self.path = path
        self.run_config = {"config": config or str(path / "run.yaml"), "overrides": overrides}
        nodes = [node_config] if node_config else [
            {"partition-id": i, "num-partitions": 4} for i in range(4)
        ]  # fmt: skip
        self.grid = InProcessGrid(app, nodes, self.run_config)
        self.nodes = list(self.grid.get_node_ids())

    def ask(self, client: int, kind: str, content):
        message = Message(content, self.nodes[client], kind, group_id="0")
        (reply,) = self.grid.send_and_receive([message])
        return reply.content

    @cached_property
    def training(self) -> TrainConfig:
        """The run's training settings."""
        return compose(self.run_config["config"], self.run_config["overrides"]).train

    def header(
        self, method: MethodConfig, round: int = 0, experiment: str = "run", steps: int = 3,
        **changes: Any,
    ) -> Header:  # fmt: skip
        """A request's header; ``changes``: of the run's training settings."""
        settings = {"local_steps": steps, "learning_rate": 0.01, **changes}
        return Header(experiment, 0, method, round, replace(self.training, **settings))

    def describe(self, client: int, method: MethodConfig = METHOD) -> DescribeReply:
        request = DescribeRequest(self.header(method), symbols=True)
        return DescribeReply.from_content(self.ask(client, DESCRIBE, request.to_content()))

    def train(
        self, client: int, round: int, values=None, expected=(), experiment="run", method=METHOD,
        maps=None, digest="", steps=3, channels: Mapping[str, Payload] | None = None,
    ) -> TrainReply:  # fmt: skip
        header = self.header(method, round, experiment, steps)
        request = TrainRequest(
            header, values or {}, digest, maps, list(expected), channels=channels or {}
        )
        return TrainReply.from_content(self.ask(client, TRAIN, request.to_content("fp32")))

    def evaluate(
        self, client: int, values=None, digest="", experiment="run", method=METHOD, round=1, maps=None,
        test_sets=("global", "personal"), channels: Mapping[str, Payload] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        header = self.header(method, round, experiment)
        request = EvaluateRequest(
            header, values or {}, digest, maps, list(test_sets), channels or {}
        )
        content = self.ask(client, EVALUATE, request.to_content("fp32"))
        return EvaluateReply.from_content(content).metrics

    def state(self, client: int, experiment: str = "run") -> dict[str, np.ndarray]:
        path = self.path / "run" / "state" / "clients" / experiment
        return load_tensors(path / f"client-{client:04d}.safetensors")


def new_world(folder: Path, path: Path) -> World:
    """A world of the backbones, rows and anchors in ``folder``, whose runs and states lie in ``path``."""
    forget_states()
    (path / "run.yaml").write_text(
        f"""
types:
  - {{backbone: {folder / "one"}, bits: nf4, clients: 2}}
  - {{backbone: {folder / "two"}, bits: bf16, clients: 2}}
data:
  name: own
  train: {folder / "train.jsonl"}
  test: {folder / "test.jsonl"}
  examples_per_client: 16
  personal_test_examples: 4
  prompt: "Package: {{text}}\nSection:"
alignment:
  anchors: {folder / "anchors.txt"}
  count: 40
  components: 8
train: {{batch_size: 4}}
run: {{dir: {path / "run"}}}
strategies: {{}}
"""
    )
    return World(path)


def make_maps(hidden: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {"down.weight": (8, hidden), "down.bias": (8,), "up.weight": (hidden, 3)}
    maps = {
        f"slots.0.map.{name}": (rng.standard_normal(shape) / 4).astype(np.float32)
        for name, shape in shapes.items()
    }
    return maps, tensor_digest(maps)


def inline(world: World) -> str:
    """The world's run as a server sends it to a deployed client."""
    return "yaml:" + (world.path / "run.yaml").read_text()


def deployed_node(folder: Path, path: Path) -> dict[str, str]:
    return {
        "client-id": "hospital-7", "backbone": str(folder / "two"), "bits": "int8",
        "data": str(folder / "private.jsonl"), "state-dir": str(path / "mine"), **LOW_FLOORS,
    }  # fmt: skip


def run(world, name, rounds=2, overrides=""):
    words = (
        "types.0.bits=bf16 method.latent=8 method.inner=4 alignment.control=random_maps alignment.count=40 "
        f"exchange.codec=fp32 server.rounds={rounds} server.evaluate_every=0 train.local_steps=2 {overrides}"
    )
    path = world.path / "shipped.yaml"
    path.write_text(
        (world.path / "run.yaml").read_text().replace("strategies: {}", f"strategies: [{name}]")
    )
    config = compose(str(path), words)
    session = Session(
        World(world.path, str(path), words).grid, config, Journal(world.path / "journal"), "all-0"
    )
    strategy = build_strategy(config.strategies[name], StrategyContext(name, config, 0, session))
    strategy.start(session.grid)
    return strategy


#: The shipped strategy with LoRA, made small.
DEEP = "heterotune_lora"


#: Predictions in every round, on few anchors.
FEW = (
    f"strategies.{DEEP}.personalization_phase=0 strategies.{DEEP}.predictions.anchors=16 "
    f"strategies.{DEEP}.predictions.batch=0 strategies.{DEEP}.method.core_rank=2"
)


def ask(world, asked, round=1, channel="predictions", expected=()):
    """A training of two steps with a channel's request."""
    channels = {channel: asked.to_payload()}
    return world.train(0, round, expected=expected, method=LORA, steps=2, channels=channels)
