"""``heterotune status`` on the journal of a real (toy) run, at its end and in its middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_federation import ToyFederation, toy_config
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.server import run_strategies
from heterotune_flwr.reporting.status import Standing, ago, follow, read_status, render


@pytest.fixture
def directory(tmp_path):
    spec = {"_component_": "heterotune_flwr.strategies.HeteroTune"}
    config = toy_config(tmp_path, (2, 1, 1), {"heterotune": spec})
    federation = ToyFederation(config, fail={("client-0001", 2)}, nan={("client-0000", 1)})
    journal = Journal(Path(config.run.dir))
    run_strategies(federation.grid(), config, journal, "toy-0")
    journal.status("finished")
    return journal.directory


def test_status_of_a_finished_run(directory):
    done = CliRunner().invoke(app, ["status", str(directory), "--json"])
    assert done.exit_code == 0, done.output
    status = json.loads(done.output)
    assert (status["state"], status["strategy"], status["round"], status["of"]) == (
        "finished",
        "heterotune",
        3,
        3,
    )
    assert status["eta"] is None
    clients = status["clients"]
    assert sorted(clients) == [f"client-000{i}" for i in range(4)]
    assert {cid: client["failures"] for cid, client in clients.items()} == {
        "client-0000": 1, "client-0001": 1, "client-0002": 0, "client-0003": 0,
    }  # fmt: skip
    assert clients["client-0001"]["answers"] == 2
    assert all(client["bits"] == "fp32" for client in clients.values())
    assert all(client["examples"] > 0 and client["last_round"] == 3 for client in clients.values())
    text = render(read_status(directory))
    assert "heterotune, seed 0: round 3 of 3, loss" in text
    assert len(text.splitlines()) == 3 + 1 + 4


def test_eta_and_silence_of_a_run_that_goes_on(directory):
    events = [
        event
        for event in read_events(directory / "rounds.jsonl")
        if event.get("round", 0) in (0, 1, 2)
    ]
    events = [event for event in events if event["event"] not in ("strategy_end", "end")]
    begin, rounds = 1000.0, {"start": 0.0}
    for event in events:
        if event["event"] in ("start", "round"):
            event["time"] = begin + 60.0 * (
                rounds["start"] if event["event"] == "start" else event["round"]
            )
    standing = follow(events, Standing("/run", "running"))
    assert standing.round == 2
    assert standing.eta == pytest.approx(60.0)
    assert "about 60 s to go" in render(standing, now=standing.last_event + 5)
    assert "is the ServerApp alive" in render(standing, now=standing.last_event + 10_000)


def test_no_run_directory(tmp_path):
    with pytest.raises(ConfigError, match="no run directory"):
        read_status(tmp_path)


def test_lengths_of_time():
    assert [ago(s) for s in (0, 119, 120, 7200, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
