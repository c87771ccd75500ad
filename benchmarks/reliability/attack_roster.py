"""Lies before round 1, on toy clients that speak the real wire contract: who ends a run, and what a cache remembers.

``fatal_lies``: of :data:`LIES`, told by one client of six, those that end everybody's run, of any seed.
``factor_drop_points_after_leaving``: a type's first client gives alignment factors of noise, in a run whose server
keeps factors from run to run; it leaves, and what the honest lose in the next run against one with an empty cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.runner import use_test_helpers
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.flower import Context, Message
from heterotune_flwr.protocol.messages import ALIGN, DESCRIBE
from heterotune_flwr.protocol.queries import AlignReply, DescribeReply

use_test_helpers()
STRATEGY = {"heterotune": {"_component_": "heterotune_flwr.strategies.heterotune.HeteroTune"}}
CLIENTS = (2, 2, 2)
Description = Callable[[DescribeReply], DescribeReply]
Factors = Callable[[Tensors], Tensors]


@dataclasses.dataclass(frozen=True)
class Lie:
    """Which client (partition) says what of itself, and what its factors are."""

    liar: int = 4
    describe: Description | None = None
    factors: Factors | None = None


def _of_itself(**fields: Any) -> Description:
    return lambda told: dataclasses.replace(told, **fields)


def _misshapen(told: DescribeReply) -> DescribeReply:
    return dataclasses.replace(told, shapes={**told.shapes, "slots.0.gate.bias": (7,)})


def _noise(factors: Tensors) -> Tensors:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=value.shape).astype(np.float32) for name, value in factors.items()
    }


def _nan(factors: Tensors) -> Tensors:
    return {name: np.full_like(value, np.nan) for name, value in factors.items()}


NEW: dict[str, Any] = {"type_key": "other@fp32", "fingerprint": "e" * 64}
LIES = {
    "another program": Lie(describe=_of_itself(code_hash="f" * 64)),
    "other labels": Lie(describe=_of_itself(labels=["x", "y"])),
    "another fingerprint": Lie(describe=_of_itself(fingerprint="0" * 64)),
    "other shapes": Lie(describe=_misshapen),
    "no layers": Lie(describe=_of_itself(layers=0, type_key="other@fp32")),
    "a vocabulary that nobody asked": Lie(describe=_of_itself(vocabulary="mine", pieces=9)),
    "a new type without factors": Lie(4, _of_itself(**NEW), lambda factors: {}),
    "a new type with NaN": Lie(4, _of_itself(**NEW), _nan),
    "a new type with noise": Lie(4, _of_itself(**NEW), _noise),
    "the first of its type, without factors": Lie(0, None, lambda factors: {}),
    "the first of its type, with NaN": Lie(0, None, _nan),
    "the first of its type, far too large": Lie(
        0, None, lambda factors: {name: np.float32(1e30) * v for name, v in factors.items()}
    ),
    "the first client, another program": Lie(0, _of_itself(code_hash="f" * 64)),
    "the first client, other labels": Lie(0, _of_itself(labels=["x", "y"])),
}


def play(seed: int, cache: Path, lie: Lie | None = None, rounds: int = 6) -> float:
    """Run a toy federation with a server's cache; mean accuracy (percent) of the honest on the shared test."""
    from toy_federation import ToyFederation, toy_config

    folder = Path(tempfile.mkdtemp(prefix="heterotune-roster-"))
    config = toy_config(folder, clients=CLIENTS, strategies=STRATEGY, rounds=rounds)
    config.run.seeds, config.alignment.cache = [seed], True
    inner = ToyFederation(config).app()

    def app(message: Message, context: Context) -> Message:
        reply: Message = inner(message, context)
        if lie is None or int(context.node_config["partition-id"]) != lie.liar:
            return reply
        if message.metadata.message_type == DESCRIBE and lie.describe:
            told = lie.describe(DescribeReply.from_content(reply.content))
            return Message(told.to_content(), reply_to=message)
        if message.metadata.message_type == ALIGN and lie.factors:
            aligned = AlignReply.from_content(reply.content)
            aligned = dataclasses.replace(aligned, factors=lie.factors(aligned.factors))
            return Message(aligned.to_content("fp32"), reply_to=message)
        return reply

    count = sum(CLIENTS)
    nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
    with (
        patch.dict(os.environ, HETEROTUNE_CACHE=str(cache)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        results = run_strategies(InProcessGrid(app, nodes), config, Journal(folder / "run"), "toy")
    liar = "" if lie is None else f"client-{lie.liar:04d}"
    rows = [row for row in results["runs"][0]["clients"] if row["client_id"] != liar]
    return 100 * statistics.fmean(
        row["global_accuracy"] for row in rows if row["global_accuracy"] is not None
    )


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """Measure both; see the module."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    fatal: dict[str, str] = {}
    for name, lie in LIES.items():
        for seed in seeds:
            try:
                play(seed, Path(tempfile.mkdtemp(prefix="heterotune-cache-")), lie, rounds=2)
            except Exception as error:  # whatever ends the run is what is counted
                fatal[name] = f"{type(error).__name__}: {error}"[:200]
    shared = Path(tempfile.mkdtemp(prefix="heterotune-cache-"))
    clean = [play(seed, Path(tempfile.mkdtemp(prefix="heterotune-cache-"))) for seed in seeds]
    during = [play(seed, shared, Lie(0, None, _noise)) for seed in seeds]
    after = [play(seed, shared) for seed in seeds]
    drops = [a - b for a, b in zip(clean, after, strict=True)]
    return {
        "fatal_lies": len(fatal),
        "factor_drop_points_after_leaving": round(statistics.fmean(drops), 3),
        "roster": {
            "lies": len(LIES),
            "fatal": fatal,
            "accuracy": {"clean": clean, "liar there": during, "liar gone": after},
        },
    }
