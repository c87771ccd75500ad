"""The launcher with a throw-away Flower app: it follows, tells why, and leaves nothing running."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
import uuid
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.federation import superlink as superlink_module
from heterotune_flwr.federation.launcher import (
    EventReader,
    Resources,
    RunOutcome,
    launch,
    launch_app,
    plan_resources,
    prepared,
)
from heterotune_flwr.federation.processes import (
    MARK,
    end_marked,
    marked_processes,
    start_guard,
)
from heterotune_flwr.federation.resume import FOLLOWER
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.federation.superlink import SuperLink, flower_environment, tail
from heterotune_flwr.programs import program, to_toml

# The config value holds both kinds of quotes, a line break and an emoji: they must arrive unharmed.
SETTINGS = 'yaml:prompt: "it\'s {text}" \n# \U0001f600 = "x"'

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
    (directory / "status.json").write_text(json.dumps({"state": "finished", "reason": None}))
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


def test_a_run_is_followed_and_leaves_nothing(
    app: Path, tmp_path: Path, marks: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome, events = run_app(app, tmp_path / "run", "finish")
    assert (outcome.failed, outcome.reason) == (False, None)
    (event,) = events
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
    assert len(events) == 1
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
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


@pytest.mark.parametrize(
    "text", ["plain", SETTINGS, "tab\there", "\x7f\x01", "back\\slash", 'ends with "']
)
def test_run_settings_survive_toml(text: str) -> None:
    assert tomllib.loads(to_toml({"key": text}))["key"] == text


def test_a_directory_with_a_run_in_it_is_refused_to_others(tmp_path: Path) -> None:
    from heterotune_flwr.federation.resume import FOLLOWER, check_free, run_lock

    config = compose("quick", [f"run.dir={tmp_path}"])
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with run_lock(tmp_path, FOLLOWER):
        for resuming in (False, True):
            with pytest.raises(ConfigError, match="a run is still writing"):
                launch(config, lambda event: None, resuming)
        with pytest.raises(ConfigError, match="a run is still writing"):
            check_free(tmp_path)
    check_free(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        ConfigError, match="a run that is not finished; go on with it: heterotune run --resume"
    ):
        launch(config, lambda event: None)
    assert (tmp_path / "rounds.jsonl").read_text() == "{}\n"


def test_results_of_an_earlier_run_are_never_overwritten(tmp_path: Path) -> None:
    config = compose("quick", [f"run.dir={tmp_path}"])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds the results of a run already"):
        launch(config, lambda event: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepared(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ConfigError, match="absolute"):
        prepared(Path("relative")).__enter__()


def test_traces_of_an_early_failure_do_not_confuse_the_next_run(tmp_path: Path) -> None:
    for name in ("status.json", "rounds.jsonl", "flower.log"):
        (tmp_path / name).write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    with prepared(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.txt", FOLLOWER}


def test_events_are_read_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    reader = EventReader(path)
    assert reader.new() == []
    path.write_text('{"event": "a"}\n{"event": "b')
    assert [e["event"] for e in reader.new()] == ["a"]
    with path.open("a") as stream:
        stream.write('"}\n\n{"event": "c"}\n')
    assert [e["event"] for e in reader.new()] == ["b", "c"]
    assert reader.new() == []


def test_resources_follow_cores_clients_and_the_user() -> None:
    cores = len(os.sched_getaffinity(0))
    config = compose("demo")
    assert plan_resources(config, 1).workers == 1
    assert plan_resources(config, 1000).workers == cores
    config.run.worker_threads = cores
    assert plan_resources(config, 1000).workers == 1
    config.run.workers = 3
    assert plan_resources(config, 1000).workers == 3
    text = Resources(2, 1, 0.25).federation_config(12)
    assert text.split() == [
        "num-supernodes=12", "client-resources-num-cpus=1", "init-args-num-cpus=2",
        "client-resources-num-gpus=0.25",
    ]  # fmt: skip


def test_the_staged_app_builds_and_carries_all_code_and_no_weights(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    app = stage_app(tmp_path / "app")
    names = {path.relative_to(app).as_posix() for path in app.rglob("*") if path.is_file()}
    assert {
        "server_app/app.py",
        "client_app/app.py",
        "conf/demo.yaml",
        "heterotune_flwr/cli.py",
    } <= names
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".toml"}
    assert 0 < len(build_fab_from_disk(app)) < 2_000_000


def test_the_tail_leaves_empty_lines_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert tail(path) == ""
    path.write_text("a\n\n" + "".join(f"{n}\n\n" for n in range(40)))
    assert tail(path, 3) == "37\n38\n39"


def test_the_checkout_itself_is_an_app_flower_accepts(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    root = Path(__file__).resolve().parents[2]
    config, warnings = load_and_validate(root / "pyproject.toml")
    assert warnings == []
    assert set(config["tool"]["flwr"]["app"]["config"]) == {"config", "overrides", "resume"}
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name in ("heterotune_flwr", "server_app", "client_app", "conf"):
        shutil.copytree(root / name, tmp_path / name)
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as bundle:
        names = set(bundle.namelist())
    staged = stage_app(tmp_path / "staged")
    same = {p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file()}
    assert same - names == set()  # a checkout and an installed wheel ship the same app
    assert not [name for name in names if name.endswith(("tokenizer.json", ".safetensors"))]


def test_flowers_programs_are_found_beside_python_or_on_the_path(tmp_path, monkeypatch):
    """``pip install --target`` and ``--user`` put them elsewhere than where Python is."""
    assert Path(program("flwr")) == Path(sys.executable).parent / "flwr"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FederationError, match=r"flwr is neither in .*elsewhere nor on the PATH"):
        program("flwr")
    (tmp_path / "flwr").touch(mode=0o755)
    assert program("flwr") == str(tmp_path / "flwr")
