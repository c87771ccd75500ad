"""What strategies compute, recorded: a change of structure changes no number.

``python tests/test_golden.py`` records anew. Do that only in a commit that means to change numbers, and say why there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compositions import entry
from toy_federation import ToyFederation, toy_config

from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.strategies import build_strategy

RECORD = Path(__file__).with_suffix(".json")
TOY = (
    "heterotune",
    "heterotune_lora",
    "within_discriminant",
    "fedmkt",
    "scaffold",
    "fedit",
    "heterofl",
)
EMBEDDED = ("heterotune", "heterotune_lora", "scaffold")
#: How much of a group's length another processor may round away: with numpy, and with quantized models.
TOY_CLOSE, EMBEDDED_CLOSE = 1e-3, 5e-2


def shipped(name: str) -> dict[str, Any]:
    """A strategy's own YAML entry, with adapters small enough for toys."""
    spec = entry(name)
    method = spec.setdefault("method", {})
    if method.get("kind") == "lora":
        method["lora_rank"] = 4
    if name == "heterotune_lora":  # toys have no cores
        for key in [key for key in method if key.startswith("core")]:
            del method[key]
    return spec


def facts(strategy: Any) -> dict[str, Any]:
    """Bank, rows and bytes of a strategy that has run."""
    digest, lengths = hashlib.sha256(), {}
    for group in sorted(strategy.state):
        squares = 0.0
        for name, value in sorted(strategy.state[group].items()):
            digest.update(f"{group} {name} {value.shape}".encode() + value.tobytes())
            squares += float(np.square(value, dtype=np.float64).sum())
        lengths[group] = float(np.sqrt(squares))
    rows = [dataclasses.asdict(row) for row in strategy.outcome.rows]
    for row in rows:  # chosen of the models, which are recorded themselves, and told for a report
        del row["kept"], row["details"]
    return {
        "digest": digest.hexdigest(), "lengths": lengths, "rows": rows,
        "bytes_up": strategy.transport.ledger.train_up,
    }  # fmt: skip


def toy(name: str, folder: Path) -> dict[str, Any]:
    """Four rounds of six toy clients, of three types where the strategy takes more than one."""
    clients = (6,) if name == "heterofl" else (2, 2, 2)  # its slices are of one parent
    config = toy_config(folder, clients, {name: shipped(name)}, rounds=4, evaluate_every=2)
    session = Session(ToyFederation(config).grid(), config, Journal(folder / "run"), "toy-0")
    strategy = build_strategy(config.strategies[name], StrategyContext(name, config, 0, session))
    strategy.start(session.grid)
    return facts(strategy)


def embedded(name: str, folder: Path) -> dict[str, Any]:
    """Two rounds of two real clients, of two embedded backbones."""
    words = (
        "'types=[{backbone: tiny-a, bits: nf4, clients: 1}, {backbone: tiny-b, bits: bf16, clients: 1}]' "
        "alignment.count=200 data.examples_per_client=48 data.global_test_examples=64 data.personal_test_examples=8 "
        "method.latent=16 method.inner=4 server.rounds=2 server.evaluate_every=0 train.local_steps=3 "
        f"alignment.cache=false alignment.components=32 run.compare=[{name}] run.dir={folder / 'run'}"
    )
    config = compose("demo", words)
    nodes = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    grid = InProcessGrid(app, nodes, {"config": "demo", "overrides": words})
    session = Session(grid, config, Journal(folder / "run"), "golden")
    strategy = build_strategy(config.strategies[name], StrategyContext(name, config, 0, session))
    strategy.start(grid)
    return facts(strategy)


def near(found: Any, wanted: Any, close: float) -> None:
    """Equal but for rounding: every group's length, and bytes exactly."""
    assert found["lengths"] == pytest.approx(wanted["lengths"], rel=close)
    assert found["bytes_up"] == wanted["bytes_up"]


@pytest.mark.parametrize("name", TOY)
def test_toys_compute_what_they_did(name, tmp_path):
    """Exactly, where numpy rounds as it did when recorded."""
    found, wanted = toy(name, tmp_path), json.loads(RECORD.read_text())["toy"][name]
    near(found, wanted, TOY_CLOSE)
    if found["digest"] == wanted["digest"]:
        assert found["rows"] == wanted["rows"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_real_models_compute_what_they_did(name, tmp_path, monkeypatch):
    """Within the rounding of other processors' kernels; ``--check`` compares exactly."""
    monkeypatch.setenv("HETEROTUNE_STATES", str(tmp_path))
    found = embedded(name, tmp_path)
    near(found, json.loads(RECORD.read_text())["embedded"][name], EMBEDDED_CLOSE)


if __name__ == "__main__":
    import tempfile

    made: dict[str, dict[str, Any]] = {"toy": {}, "embedded": {}}
    for kind, names, run in (("toy", TOY, toy), ("embedded", EMBEDDED, embedded)):
        for each in names:
            with tempfile.TemporaryDirectory() as where:
                made[kind][each] = run(each, Path(where))
    if "--check" in sys.argv:
        old = json.loads(RECORD.read_text())
        wrong = [f"{kind} {n}" for kind in old for n in old[kind] if old[kind][n] != made[kind][n]]
        sys.exit(f"differs: {wrong}" if wrong else 0)
    RECORD.write_text(json.dumps(made, indent=1) + "\n")
