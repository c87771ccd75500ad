"""The launcher with a throw-away Flower app: it follows, tells why, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_run_directory import SETTINGS

from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation import superlink as superlink_module
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.launcher import (
    Resources,
    RunOutcome,
    launch_app,
    prepared,
)
from heterotune_flwr.federation.processes import (
    MARK,
    end_marked,
    marked_processes,
    start_guard,
)
from heterotune_flwr.federation.superlink import SuperLink, flower_environment

SERVER = """
import json, os, signal, time
from pathlib import Path
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    directory = Path(str(context.run_config["directory"]))
    deed = context.run_config["deed"]
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    with (directory / "rounds.jsonl").open("a") as stream:
        seen = {"event": "seen", "settings": context.run_config["config"], "cwd": os.getcwd(),
                "nodes": len(list(grid.get_node_ids()))}
        print(json.dumps(seen), file=stream)
    if deed == "raise":
        raise RuntimeError("the dog ate the bank")
    if deed == "vanish":
        os.kill(os.getpid(), signal.SIGKILL)
    aside = directory / "status.aside"  # as a journal writes it: whole or not at all
    aside.write_text(json.dumps({"state": "finished", "reason": None}))
    aside.rename(directory / "status.json")
"""

CLIENT = """
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)
"""

PROJECT = """
[project]
name = "throw-away"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "throwaway.server:app"
clientapp = "throwaway.client:app"
[tool.flwr.app.config]
config = ""
directory = ""
deed = ""
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "throwaway").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "throwaway" / "__init__.py").write_text("")
    (folder / "throwaway" / "server.py").write_text(SERVER)
    (folder / "throwaway" / "client.py").write_text(CLIENT)
    return folder


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Marks of all runs of a test, to look for what they left."""
    seen: list[str] = []
    original = superlink_module.start_guard

    def remember(mark: str, folders: Any) -> subprocess.Popen[bytes]:
        seen.append(mark)
        return original(mark, folders)

    monkeypatch.setattr(superlink_module, "start_guard", remember)
    return seen


def run_app(app: Path, directory: Path, deed: str) -> tuple[RunOutcome, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    settings = {"config": SETTINGS, "directory": str(directory), "deed": deed}
    with prepared(directory):
        return launch_app(app, settings, directory, 2, events.append), events


def test_the_first_event_after_a_crash_has_a_line_of_its_own(app: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with prepared(directory):
        (directory / "rounds.jsonl").write_text('{"event": "round", "rou')
        events: list[dict[str, Any]] = []
        with pytest.raises(FederationError):  # no such app, so Flower refuses
            launch_app(tmp_path / "none", {}, directory, 2, events.append, notes=["9 rows"])
    written = read_events(directory / "rounds.jsonl")
    assert (written[0]["event"], written[0]["notes"]) == ("data", ["9 rows"])
    assert (written[1]["event"], written[1]["torn_line"]) == ("starting", True)
    assert events[:2] == written[:2]


def test_a_run_is_followed_and_leaves_nothing(
    app: Path, tmp_path: Path, marks: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome, events = run_app(app, tmp_path / "run", "finish")
    assert (outcome.failed, outcome.reason) == (False, None)
    assert [event["event"] for event in events[:2]] == ["starting", "starting"]
    (event,) = events[2:]
    assert event["settings"] == SETTINGS
    assert event["nodes"] == 2
    assert event["cwd"] == str(tmp_path / "run" / "flower" / "cwd")
    assert len(marks) == 1
    assert marked_processes(marks[0]) == []
    assert not (tmp_path / "run" / "flower").exists()
    assert "Flower SuperLink" in (tmp_path / "run" / "flower.log").read_text()
    assert capfd.readouterr().out == ""  # the caller's screen is its own


def test_a_failing_server_gives_its_traceback_and_a_status(
    app: Path, tmp_path: Path, marks: list[str]
) -> None:
    outcome, events = run_app(app, tmp_path / "run", "raise")
    assert outcome.failed
    assert outcome.reason is not None
    assert "finished:failed" in outcome.reason
    assert "the dog ate the bank" in (tmp_path / "run" / "flower.log").read_text()
    assert "the dog ate the bank" in outcome.log_tail
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", outcome.reason)
    assert [event["event"] for event in events[2:]] == ["seen", "failed"]
    assert marked_processes(marks[0]) == []


@pytest.mark.slow
def test_a_killed_simulation_is_noticed_within_seconds(
    app: Path, tmp_path: Path, marks: list[str]
) -> None:
    started = time.monotonic()
    outcome, _ = run_app(app, tmp_path / "run", "vanish")
    assert outcome.failed
    assert outcome.reason is not None
    assert time.monotonic() - started < 90
    assert marked_processes(marks[0]) == []  # Ray's orphans included


def _superlink_in_child(folder: Path) -> tuple[subprocess.Popen[str], str, Path]:
    """Start a launcher in another process that holds a SuperLink for ever; (it, mark, Ray's folder)."""
    code = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from heterotune_flwr.federation.processes import interrupt, on_signals
        from heterotune_flwr.federation.superlink import SuperLink
        folder = Path({str(folder)!r})
        signals = on_signals(interrupt, "SIGTERM", "SIGHUP")
        with signals, SuperLink(folder / "work", folder / "log") as link:
            print(link.mark, link.environment["RAY_TMPDIR"], flush=True)
            time.sleep(300)
    """)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    mark, ray = child.stdout.readline().split()
    return child, mark, Path(ray)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    child, mark, ray = _superlink_in_child(tmp_path)
    assert len(marked_processes(mark)) >= 2  # SuperLink and SuperExec
    child.send_signal(number)
    child.wait(timeout=30)
    deadline = time.monotonic() + 30  # SIGKILL: the guard ends them a moment later
    while marked_processes(mark) or (tmp_path / "work").exists():
        assert time.monotonic() < deadline, marked_processes(mark)
        time.sleep(0.1)
    assert not ray.exists()
    assert child.returncode != 0


def test_a_superlink_that_cannot_start_is_one_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: list[str]
) -> None:
    with SuperLink(tmp_path / "first", tmp_path / "log") as first:
        port = int((tmp_path / "first/home/config.toml").read_text().split(":")[1].split('"')[0])
        monkeypatch.setattr(superlink_module, "free_port", lambda: port)
        # The port answers, but it is another run's: refused rather than used.
        with pytest.raises(FederationError, match=r"taken by another|did not start"):
            SuperLink(tmp_path / "second", tmp_path / "log2").__enter__()
        assert first.exit_code() is None
    assert [marked_processes(mark) for mark in marks] == [[], []]


def test_flower_refusing_a_run_is_an_error_with_its_words(app: Path, tmp_path: Path) -> None:
    with SuperLink(tmp_path / "work", tmp_path / "log") as link:
        with pytest.raises(FederationError, match="Flower refused the run"):
            link.submit(app, {"no-such-key": "1"}, Resources(1).federation_config(2))
        (app / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        with pytest.raises(FederationError, match="Flower refused the run"):
            link.submit(app, {}, Resources(1).federation_config(2))


def test_marked_processes_are_found_when_their_parent_is_gone_and_ended() -> None:
    mark = uuid.uuid4().hex
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {stubborn!r}]).pid)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip() for _ in range(2)}
    orphan = int((lines - {"deaf"}).pop())
    parent.wait()
    assert [p.pid for p in marked_processes(mark)] == [orphan]
    end_marked("another", grace=0.2)
    assert psutil.pid_exists(orphan)
    end_marked(mark, grace=0.5)
    assert marked_processes(mark) == []


def test_the_guard_cleans_up_when_its_pipe_closes(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    victim = subprocess.Popen(["sleep", "99"], env={**os.environ, MARK: "guarded"})
    guard = start_guard("guarded", [folder])
    assert guard.stdin is not None
    time.sleep(0.3)
    assert victim.poll() is None
    guard.stdin.close()
    assert guard.wait(timeout=20) == 0
    assert victim.wait(timeout=5) != 0
    assert not folder.exists()


def test_the_environment_has_no_relative_paths_and_no_foreign_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["mine", "/abs"]))
    monkeypatch.setenv("HETEROTUNE_CACHE", "cache")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    environment = flower_environment(tmp_path / "home", tmp_path / "ray", "m", 3)
    assert environment["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "mine"), "/abs"])
    assert environment["HETEROTUNE_CACHE"] == str(tmp_path / "cache")
    assert "RAY_ADDRESS" not in environment
    assert environment["OMP_NUM_THREADS"] == "3"
    assert Path(environment["HETEROTUNE_ASSETS"].split(os.pathsep)[-1]).name == "assets"
