"""Ten toy clients of three types, any shipped strategy: what the fault cases run on."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from compositions import entry
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import Message
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.strategies import build_strategy

ROOT = Path(__file__).resolve().parents[2]
#: Every strategy that ships, by the name of its file.
SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml"))
#: Two clients of one type (0 and 3 are the first type's), two of different types.
SAME_TYPE, TWO_TYPES = ("client-0000", "client-0003"), ("client-0001", "client-0005")


def toy_spec(name: str) -> dict:
    """An entry (:func:`.compositions.entry`) at the toy's sizes: its rules are kept, its widths and rates are not."""
    spec = entry(name)
    method = spec.get("method", {})
    if method.get("kind") == "lora":
        method |= {"lora_rank": 4, "lora_alpha": 4.0}
    else:
        for key in ("slots", "latent", "inner"):
            method.pop(key, None)
    if "ranks" in spec:
        spec["ranks"] = [2, 4]
    if spec.get("predictions"):
        spec["predictions"] |= {"anchors": 12, "pool": 12}
    train = spec.setdefault("train", {})
    if train.get("optimizer") != "sgd":
        train["learning_rate"] = 0.02
    return {**spec, "method": method}


def answering(kind, change, liars):
    """A ``prepare``: the liars' replies to messages of a kind (train, align ...) have another content.

    ``change``: the content of an honest reply -> the content that is sent.
    """

    def prepare(federation, grid):
        honest = getattr(federation, kind)

        def handler(message, context):
            reply = honest(message, context)
            if federation.who(context)[0] in liars:
                reply = Message(change(reply.content), reply_to=message)
            return reply

        setattr(federation, kind, handler)

    return prepare


def describing(change, liars):
    """The same of descriptions; ``change``: an honest :class:`DescribeReply` -> another."""
    return answering(
        "describe", lambda content: change(DescribeReply.from_content(content)).to_content(), liars
    )


@dataclass
class Ended:
    """What is left of a run: the strategy, its journal, and the clients' final losses on the global test."""

    strategy: Any
    events: list = field(default_factory=list)

    def loss(self, without=()):
        """Mean over the clients not named."""
        rows = [row for row in self.strategy.outcome.rows if row.client_id not in without]
        return float(np.mean([row.global_loss for row in rows]))

    def finite(self) -> bool:
        return all(np.isfinite(v).all() for v in self.strategy.shared_tensors().values())

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


class Memory(Journal):
    """A journal that keeps its events at hand too."""

    def __init__(self, directory):
        self.seen = []
        super().__init__(directory)

    def event(self, event, /, **fields):
        super().event(event, **fields)
        self.seen.append({"event": event, **fields})


def run(spec, clients=(4, 3, 3), seed=0, prepare=None, drop=None, skew=0.4, toys=None, **server):
    """Run one strategy entry; ``prepare`` is called with (federation, grid) before the start."""
    with tempfile.TemporaryDirectory() as folder:
        config = toy_config(Path(folder), clients, **{"timeout_seconds": 0.05, **server})
        federation = (toys or ToyFederation)(config, skew=skew)
        grid = federation.grid(drop=drop)
        if prepare is not None:
            prepare(federation, grid)
        journal = Memory(Path(config.run.dir))
        session = Session(grid, config, journal, "toy-0")
        strategy = build_strategy(spec, StrategyContext("faults", config, seed, session))
        logging.getLogger("flwr").setLevel(
            logging.ERROR
        )  # Flower's own strategies tell of every step
        strategy.start(grid)
        return Ended(strategy, journal.seen)
