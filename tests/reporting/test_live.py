"""What a person sees while a run goes on, from the events of a real (toy) run with trouble in it."""

from __future__ import annotations

import io
import json
import re
import time

import pytest
from rich.console import Console
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, run_all
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation import launcher
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.launcher import RunOutcome
from heterotune_flwr.reporting.live import LiveView
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.standing import Follower, Standing, follow
from heterotune_flwr.reporting.status import render
from heterotune_flwr.reporting.time_left import Plan


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Configuration and events of a run of which one client fails in every round but the first."""
    tmp_path = tmp_path_factory.mktemp("live")
    config = toy_config(tmp_path, (2, 2, 2), {"heterotune": KINDS["heterotune"]}, rounds=4)
    federation = ToyFederation(config, fail={("client-0001", n) for n in (2, 3, 4)})
    run_all(config, federation)
    return config, read_events(tmp_path / "run" / "rounds.jsonl")


def until(events, kind, round):
    """Events up to the first one of a kind and round."""
    at = [(event["event"], event.get("round")) for event in events].index((kind, round))
    return events[: at + 1]


def drawn(config, events, width):
    follower = Follower(Standing("run", "running"), Plan.of(config))
    for event in events:  # some seconds ago: what is left of a step grows with what it took so far
        follower.take({**event, "time": event.get("time", time.time()) - 5})
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, no_color=True)
    console.print(LiveView(follower, time.time() - 75))
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", text.getvalue()).splitlines()]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_live_view_says_all_in_lines_that_fit(ended, width):
    config, events = ended
    middle = drawn(config, [*until(events, "asked", 3), *events_of(events, "bytes", 3)[:2]], width)
    text = "\n".join(middle)
    for expected in (
        "HeteroTune, seed 0, 4 rounds", "1:15", "left", "round 3: training, 2 of 6 answered", "loss ", "accuracy",
        "kB up", "small@fp32", "1 of 2", "client-0001 failed once", "Ctrl-C",
    ):  # fmt: skip
        assert expected in text, text
    assert all(len(line) <= width for line in middle), text
    assert len(middle) <= 14


def test_who_was_not_asked_has_not_answered(ended):
    config, events = ended
    asked = {"event": "asked", "message_type": "train", "time": 1.0, "asked": ["client-0000"]}
    lines = drawn(config, [*until(events, "round", 1), asked], 80)
    first = next(e for e in events if e["event"] == "describe")["members"]["client-0000"]
    (row,) = [line for line in lines if line.strip().startswith(first)]
    assert "0 of 1" in row
    assert not any("2 of 2" in line for line in lines)


def events_of(events, kind, round):
    return [e for e in events if e["event"] == kind and e.get("round") == round]


def test_long_and_hostile_names_break_nothing(ended):
    config, events = ended
    bad = "\x1b]0;pwned\x07[red]" + 60 * "n"
    events = [
        *until(events, "round", 1),
        {"event": "left_out", "client_id": bad, "node_id": "1", "reason": bad},
        {"event": "asked", "message_type": "train", "asked": [bad], "time": time.time()},
    ]
    lines = drawn(config, events, 60)
    assert all(len(line) <= 60 for line in lines)
    assert "\x1b]0" not in "\n".join(lines)


def test_whoever_failed_is_told_until_it_works_again(ended):
    events = ended[1]
    standing = follow(events, Standing("run", "running"))
    failing = standing.clients["client-0001"]
    assert (failing.in_a_row, failing.until) == (3, 6)
    assert "client-0001 sits out until after round 6: failed 3 times in a row" in render(standing)
    good = {"event": "asked", "message_type": "train", "asked": ["client-0001"]}
    follower = Follower(standing)
    for event in (
        {"event": "returned", "client_id": "client-0001"},
        good,
        {"event": "round", "round": 7},
    ):
        follower.take(event)
    assert not standing.failing


def test_status_says_who_is_waited_for_and_what_expired(ended):
    _, events = ended
    named = {"event": "asked", "message_type": "train", "time": 100.0, "seconds": 60.0}
    late = {
        "event": "client_failed",
        "client_id": "n2",
        "reason": "no reply within 60 s",
        "straggler": True,
    }
    events = [
        *until(events, "round", 1),
        late,
        {**named, "asked": ["n1", "n2"]},
        {"event": "bytes", "client_id": "n1"},
    ]
    text = render(follow(events, Standing("run", "running")), now=130.0)
    assert "round 2: training, 1 of 2 answered, 30 s (at most 60 s); waiting for n2" in text
    assert "expired: 1 requests were not answered in time (of n2)" in text


def test_silence_is_broken_by_what_is_being_done(monkeypatch, ended):
    monkeypatch.setattr("heterotune_flwr.reporting.progress.SILENCE_SECONDS", 0.0)
    text = io.StringIO()
    with RunProgress(ended[0], Console(file=text, width=80)) as progress:
        progress(
            {
                "event": "aligning",
                "part": "slots",
                "types": ["a@nf4"],
                "anchors": 9,
                "time": time.time() - 40,
            }
        )
        deadline = time.monotonic() + 10
        while "for 4" not in text.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "a client of each type reads the public anchors, for 4" in text.getvalue()


def launched(monkeypatch, tmp_path, events, error=None):
    """``heterotune run`` with a launch that tells these events, and then ends or raises."""

    def launch(config, on_event, *_):
        for event in events:
            on_event(event)
        if error is not None:
            raise error
        return RunOutcome(tmp_path / "run", True, "it broke")

    monkeypatch.setattr(launcher, "launch", launch)
    return lambda *options: CliRunner().invoke(
        app, ["run", "quick", "--dir", str(tmp_path / "run"), *options]
    )


def test_json_is_the_journal_and_quiet_is_errors_alone(monkeypatch, tmp_path, ended):
    events = ended[1]
    command = launched(monkeypatch, tmp_path, events)
    told = command("--json")
    assert [json.loads(line) for line in told.stdout.splitlines()] == events
    assert told.exit_code == 2
    silent = command("--quiet")
    assert silent.stdout == ""
    assert "the run failed: it broke" in silent.stderr
    assert isinstance(command("--json", "--quiet").exception, ConfigError)


def test_ctrl_c_says_how_the_run_goes_on(monkeypatch, tmp_path, ended):
    command = launched(monkeypatch, tmp_path, ended[1], KeyboardInterrupt())
    early = command()
    assert early.exit_code == 130
    assert "nothing to go on from" in early.stderr
    kept = tmp_path / "run" / "checkpoints" / "heterotune-seed0"
    kept.mkdir(parents=True)
    (kept / "round-000001.safetensors").touch()
    monkeypatch.setattr("heterotune_flwr.runs.check_directory", lambda directory: None)
    late = command()
    assert late.exit_code == 130
    assert f"heterotune run --resume {tmp_path / 'run'}" in late.stderr
