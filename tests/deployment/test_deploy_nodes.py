"""Nodes as ``node.toml`` describes them, in this process: their own data forms, what they tell, code they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.deployment.runs import configuration
from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.node_config import read_node_settings
from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.schema import DataConfig


@pytest.fixture
def nodes(tmp_path):
    """Two node configurations from generated ``node.toml`` files: Parquet, and chat messages in JSON lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    deployment = initialise(tmp_path / "lab", ["h.org"], ["quiet", "chatty"], {}, 9, False)
    examples = training_pool(DataConfig())[:80]
    table = [{"description": e.text, "section": e.label} for e in examples[:40]]
    pq.write_table(pa.Table.from_pylist(table), deployment.node("quiet") / "mine.parquet")
    chats = [
        {"chat": [{"role": "user", "content": e.text}, {"role": "assistant", "content": e.label}]}
        for e in examples[40:]
    ]
    lines = "".join(json.dumps(row) + "\n" for row in chats)
    (deployment.node("chatty") / "data.jsonl").write_text(lines)
    for name, changes in {
        "quiet": {
            'data = "data.jsonl"': 'data = "mine.parquet"',
            'text-field = "text"': 'text-field = "description"',
            'label-field = "label"': 'label-field = "section"',
            "# report =": "report =",
        },
        "chatty": {'text-field = "text"': 'text-field = "chat"'},
    }.items():
        path = deployment.node(name) / "node.toml"
        text = path.read_text().replace('bits = "auto"', 'bits = "bf16"')
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
    return [read_node_settings(deployment.node(name)).node_config() for name in ("quiet", "chatty")]


def run(tmp_path, nodes, rounds=1):
    text = configuration(tmp_path / "run", rounds)
    few = "server.wait_seconds=1 server.min_clients=2"
    grid = InProcessGrid(app, nodes, {"config": text, "overrides": ""})
    run_strategies(grid, compose(text, few), Journal(tmp_path / "run"), "here-0")
    return read_events(tmp_path / "run" / "rounds.jsonl")


def test_nodes_bring_data_of_any_form_and_tell_what_they_allow(nodes, tmp_path):
    events = run(tmp_path, nodes)
    told = {e["client_id"]: set(e) for e in events if e["event"] == "train_reply"}
    frame = {"event", "time", "strategy", "seed", "round", "of", "client_id", "type"}
    assert told["quiet"] - frame == {"examples", "steps", "learning_rate", "loss"}
    assert told["chatty"] - frame > {"examples", "steps", "learning_rate", "loss", "accuracy"}
    (round_1,) = [e for e in events if e["event"] == "round"]
    assert round_1["clients"] == 2
    assert Path(nodes[0]["state-dir"]).parent.name == "quiet"


def test_a_node_refuses_other_code_in_every_message(nodes, tmp_path):
    nodes[1]["code-hash"] = "0123456789abcdef"
    with pytest.raises(FederationError, match="accepts only code 0123456789abcdef"):
        run(tmp_path, nodes)
    assert not [
        e for e in read_events(tmp_path / "run" / "rounds.jsonl") if e["event"] == "train_reply"
    ]
