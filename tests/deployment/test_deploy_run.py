"""A whole run over TLS with node authentication gives the bank that the simulation gives; other code is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.lab import Lab, has_nginx
from client_app.app import app
from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.dema.bank import generator
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.server import run_strategies
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.reporting.status import read_status

NODES = {"client-0000": "tiny-a", "client-0001": "tiny-b", "client-0002": "tiny-a"}
RUN = """yaml:
groups: {types: tiny, data: debian_sections, method: dema, alignment: labels, train: small_data, exchange: fp32,
  server: deployment}
strategies: [heterotune]
types: [{backbone: tiny-a, bits: bf16, clients: 2}, {backbone: tiny-b, bits: bf16, clients: 1}]
data: {examples_per_client: 24, personal_test_examples: 8}
method: {latent: 32, inner: 8}
alignment: {count: 200, components: 64}
train: {local_steps: 3}
server: {rounds: 2, evaluate_every: 0, min_clients: 3, wait_seconds: 600, timeout_seconds: 600}
run: {name: deployed, dir: DIRECTORY}
"""


def shard_file(path: Path, config, partition: int) -> Path:
    """Write a node's file such that it trains on the simulated client's examples, in their order."""
    shard = client_examples(config.data, partition, len(NODES), config.run.seeds[0])
    wanted = [*shard.personal_test, *shard.train]
    # A deployed client shuffles its file and holds the first examples out: undo that beforehand.
    order = generator(config.run.seeds[0], "data.local").permutation(len(wanted))
    rows = [None] * len(wanted)
    for place, example in zip(order, wanted, strict=True):
        rows[place] = json.dumps({"text": example.text, "label": example.label}) + "\n"
    path.write_text("".join(rows))
    return path


def simulated_bank(directory: Path):
    config = compose(RUN.replace("DIRECTORY", str(directory)), "server.wait_seconds=1")
    nodes = [{"partition-id": i, "num-partitions": len(NODES)} for i in range(len(NODES))]
    grid = InProcessGrid(
        app, nodes, {"config": RUN.replace("DIRECTORY", str(directory)), "overrides": ""}
    )
    run_strategies(grid, config, Journal(directory), "simulated-0")
    return config, the_bank(directory)


def the_bank(directory: Path):
    (path,) = (directory / "banks").glob("*.safetensors")
    return load_tensors(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The simulation's result, and a laboratory whose nodes hold the simulated clients' data."""
    folder = tmp_path_factory.mktemp("world")
    config, bank = simulated_bank(folder / "simulated")
    with Lab(folder, list(NODES), proxy=has_nginx()) as lab:
        for number, (name, backbone) in enumerate(NODES.items()):
            place = lab.configure(name, client_id=name, backbone=backbone, bits="bf16", threads=1)
            shard_file(place / "data.jsonl", config, number)
        lab.configure("client-0002", report="counts-and-loss-only")
        lab.register()
        for name in NODES:
            lab.start_node(name)
        lab.await_online(set(NODES))
        yield folder, lab, bank


@pytest.mark.slow
def test_code_that_the_nodes_have_not_installed_is_refused_and_harms_nothing(world):
    folder, lab, _ = world
    foreign = stage_app(folder / "foreign")
    with (foreign / "heterotune_flwr" / "errors.py").open("a") as stream:
        stream.write("# another version\n")
    run_id = lab.submit(foreign, config=RUN.replace("DIRECTORY", str(folder / "refused")))
    assert lab.await_end(run_id) == "finished:failed"
    status = json.loads((folder / "refused" / "status.json").read_text())
    assert "only 0 of 3 clients can take part" in status["reason"]
    assert "install the server's version on the node" in status["reason"]
    assert lab.online() == set(NODES)
    for name in NODES:
        assert not list(lab.deployment.node(name).rglob("*.safetensors"))


@pytest.mark.slow
def test_the_deployed_bank_is_the_simulated_one(world):
    folder, lab, simulated = world
    run_id = lab.submit(
        stage_app(folder / "app"), config=RUN.replace("DIRECTORY", str(folder / "run"))
    )
    assert lab.await_end(run_id) == "finished:completed", lab.everything()
    deployed = the_bank(folder / "run")
    assert set(deployed) == set(simulated)
    difference = max(float(np.max(np.abs(deployed[name] - simulated[name]))) for name in simulated)
    scale = max(float(np.max(np.abs(value))) for value in simulated.values())
    print(f"greatest difference {difference:.3g} of {scale:.3g}")
    assert scale > 0.01
    assert difference <= 1e-5 * scale
    standing = read_status(folder / "run")
    assert (standing.state, standing.round, standing.of) == ("finished", 2, 2)
    assert {name: client.answers for name, client in standing.clients.items()} == dict.fromkeys(
        NODES, 2
    )
    replies = [
        e for e in read_events(folder / "run" / "rounds.jsonl") if e["event"] == "train_reply"
    ]
    told = {e["client_id"]: set(e) for e in replies}
    assert "accuracy" in told["client-0000"]
    metrics = told["client-0002"] - {
        "event",
        "time",
        "strategy",
        "seed",
        "round",
        "of",
        "client_id",
        "type",
    }
    assert metrics == {"examples", "steps", "learning_rate", "loss"}
    # Nothing of the nodes' data is on the server.
    texts = [json.loads(line)["text"] for line in
             (lab.deployment.node("client-0001") / "data.jsonl").read_text().splitlines()]  # fmt: skip
    server = [
        p for p in [*lab.deployment.server.rglob("*"), *(folder / "run").rglob("*")] if p.is_file()
    ]
    assert len(server) > 10
    for path in server:
        content = path.read_bytes()
        assert not [text for text in texts if len(text) > 20 and text.encode() in content], path


def test_shard_files_give_the_simulated_clients_examples(tmp_path):
    from heterotune_flwr.data.partition import local_examples

    if asset_path("debian_sections/train.jsonl.gz") is None:
        pytest.skip("no embedded data")
    config = compose(RUN.replace("DIRECTORY", str(tmp_path)))
    for number in range(len(NODES)):
        path = shard_file(tmp_path / f"{number}.jsonl", config, number)
        mine = local_examples(config.data, str(path), config.run.seeds[0])
        theirs = client_examples(config.data, number, len(NODES), config.run.seeds[0])
        assert [e.text for e in mine.train] == [e.text for e in theirs.train]
        assert [e.text for e in mine.personal_test] == [e.text for e in theirs.personal_test]
    shutil.rmtree(tmp_path)
