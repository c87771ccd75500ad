"""A whole run over TLS with node keys gives the bank of the same nodes in one process; other code is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.deployment.lab import Lab, has_nginx
from benchmarks.deployment.runs import (
    NODES,
    configuration,
    final_bank,
    give_book,
    greatest_difference,
    join,
    shard_file,
    simulated_bank,
)
from heterotune_flwr.client.node_book import NodeBook
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples, own_examples
from heterotune_flwr.deploy.submit import submit
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.reporting.status import read_status


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The result of the same nodes in one process, and a laboratory."""
    folder = tmp_path_factory.mktemp("world")
    config, bank = simulated_bank(folder / "simulated")
    with Lab(folder, list(NODES), proxy=has_nginx()) as lab:
        lab.configure("client-0002", report="counts-and-loss-only")
        join(lab, config, books=folder / "books")
        yield folder, lab, bank


@pytest.mark.slow
def test_code_that_the_nodes_have_not_installed_is_refused_and_harms_nothing(world):
    folder, lab, _ = world
    foreign = stage_app(folder / "foreign")
    with (foreign / "heterotune_flwr" / "errors.py").open("a") as stream:
        stream.write("# another version\n")
    run_id = lab.submit(foreign, config=configuration(folder / "refused"))
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
    mine = folder / "mine.yaml"
    mine.write_text(configuration(folder / "run").removeprefix("yaml:"))
    run_id = submit(lab.deployment, str(mine), ["run.name=mine"], None).run_id
    assert lab.await_end(run_id) == "finished:completed", lab.everything()
    deployed = final_bank(folder / "run")
    difference = greatest_difference(deployed, simulated)
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


def test_shard_files_hold_the_simulated_clients_examples_and_a_book_makes_runs_alike(tmp_path):
    config = compose(configuration(tmp_path))
    for number in range(len(NODES)):
        path = shard_file(tmp_path / f"{number}.jsonl", config, number)
        theirs = client_examples(config.data, number, len(NODES), config.run.seeds[0])
        mine = own_examples(replace(config.data, train=str(path)))
        assert [e.text for e in mine] == [e.text for e in [*theirs.train, *theirs.personal_test]]
    for place in ("one", "other"):
        give_book(tmp_path / "books", "n", tmp_path / place)
    one, other, own = (NodeBook(tmp_path / place).keyed("x") for place in ("one", "other", "own"))
    assert one == other != own
