"""``heterotune status`` on the journal of a real (toy) run, at its end and in its middle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from toy_federation import ToyFederation, toy_config
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal, read_events
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
    for event in events:
        event["time"] = 1000.0 + 60.0 * event.get("round", 0)
    standing = follow(events, Standing("/run", "running"))
    assert standing.round == 2
    assert standing.eta == pytest.approx(60.0)
    assert "s left" in render(standing, now=standing.last_event + 5)
    assert "is the ServerApp alive" in render(standing, now=standing.last_event + 10_000)


@pytest.mark.parametrize(
    ("upto", "phase"),
    [("journal", "starting"), ("asking", "4 are needed"), ("describe", "making the maps"), ("start", "testing")],
)  # fmt: skip
def test_before_the_first_round_it_says_what_is_done_and_who_is_there(directory, upto, phase):
    events = read_events(directory / "rounds.jsonl")
    end = [event["event"] for event in events].index(upto)
    standing = follow(events[: end + 1], Standing("/run", "running"))
    assert phase in render(standing)
    there = upto in ("describe", "start")
    assert len(standing.clients) == (4 if there else 0)
    assert all(c.bits == "fp32" and c.last_seen for c in standing.clients.values())
    begun = [event for event in events if event["event"] != "end"]
    assert follow(begun, Standing("/run", "running")).phase is None


def test_nodes_that_are_left_out_are_listed():
    events = [
        {"event": "left_out", "time": 1.0, "node_id": "7", "client_id": "n3", "reason": "its data"},
        {"event": "left_out", "time": 1.0, "node_id": "8", "client_id": "", "reason": "error 5"},
    ]
    text = render(follow(events, Standing("/run", "running")))
    assert re.search(r"n3 .*never; its data", text)
    assert re.search(r"node 8 .*never; error 5", text)


ODD = [None, "soon", [], {}, True, float("nan"), 10**400]


KINDS = ("round", "start", "resumed", "describe", "train_reply", "asking", "bytes", "left_out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_journal_is_read_as_far_as_it_goes(directory, kind):
    good = read_events(directory / "rounds.jsonl")
    odd = [
        dict.fromkeys(
            ("time", "round", "of", "loss", "types", "members", "client_id", "type", "examples", "needed", "reason"),
            value,
        )
        for value in ODD
    ]  # fmt: skip
    events = [*good, {"event": kind}, *({"event": kind, **fields} for fields in odd)]
    events += [{"event": kind, "types": {"a": 3}}, {"event": []}, {"event": kind, "seed": []}]
    assert render(follow(events, Standing("/run", "running")))


def test_a_run_of_another_user(directory, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("heterotune_flwr.reporting.status.read_events", closed)
    with pytest.raises(ConfigError, match="Permission denied; ask as the user"):
        read_status(directory)
    monkeypatch.setattr(Path, "is_file", closed)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_status(directory)


def test_no_run_directory(tmp_path):
    with pytest.raises(ConfigError, match="no run directory"):
        read_status(tmp_path)


def test_lengths_of_time():
    assert [ago(s) for s in (0, 119, 120, 7200, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
