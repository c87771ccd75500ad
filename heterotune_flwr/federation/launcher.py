"""Starts a Flower simulation properly, follows it to its end, and leaves nothing running.

Every run gets a SuperLink of its own: own ``FLWR_HOME``, a free port, a neutral working directory, no run-time
installation of dependencies, no telemetry. (A bare ``flwr run`` starts a SuperLink that lives for ever and keeps
the directory and environment of whoever started it first.)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from heterotune_flwr import __version__
from heterotune_flwr.config.compose import INLINE, conf_root, to_yaml
from heterotune_flwr.config.schema import Config
from heterotune_flwr.errors import FederationError

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
POLL_SECONDS = 0.5
LIST_SECONDS = 20.0
#: Flower's own name for a finished run, and how it ended.
_OVER = "finished"

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "heterotune-flwr"
version = "{version}"
description = "Federated fine-tuning of different large language models together"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.41"]

[tool.flwr.app]
publisher = "heterotune"

[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"

[tool.flwr.app.config]
config = "demo"
overrides = ""
"""

Event = dict[str, Any]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: its directory and, when it failed, one line that says why."""

    directory: Path
    failed: bool
    reason: str | None


def stage_app(folder: Path) -> Path:
    """Write a Flower app (code and YAML, no weights) that any SuperLink accepts; returns ``folder``."""
    import heterotune_flwr

    package = Path(heterotune_flwr.__file__).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(version=__version__))
    roots = {"heterotune_flwr": package, "conf": conf_root()}
    for name in ("server_app", "client_app"):
        roots[name] = package.parent / name
    for name, root in roots.items():
        if not root.is_dir():
            raise FederationError(f"the folder {name}/ is missing beside {package}; reinstall the package")
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
            relative = path.relative_to(root)
            if name == "heterotune_flwr" and relative.parts[0] == "conf":
                continue
            target = folder / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flower_environment(home: Path, port: int, threads: int) -> dict[str, str]:
    """Environment of every process of a run."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "NO_COLOR": "1",
    }


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _owns_port(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the listening socket belongs to the process we started (or a child of it)."""
    ours = {process.pid} | {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    for pid in ours:
        try:
            connections = psutil.Process(pid).net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return True
    return False


def _tail(path: Path, lines: int = 15) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _end_processes(root: int) -> None:
    """End a process and all its descendants: ask first, insist after five seconds."""
    try:
        parent = psutil.Process(root)
    except psutil.NoSuchProcess:
        return
    family = [*parent.children(recursive=True), parent]
    for process in family:
        with _gone_is_fine():
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        with _gone_is_fine():
            process.kill()
    psutil.wait_procs(alive, timeout=5)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C does, through the clean-up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def local_superlink(work: Path, log: Path, threads: int) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode for the length of the block; yields the environment to use it.

    Raises
    ------
    FederationError
        It did not come up; the end of its log is part of the message.

    """
    port = free_port()
    home = work / "flwr-home"
    neutral = work / "cwd"
    for folder in (home, neutral):
        folder.mkdir(parents=True, exist_ok=True)
    environment = flower_environment(home, port, threads)
    command = [
        str(Path(sys.executable).parent / "flower-superlink"), "--insecure", "--simulation",
        "--isolation", "subprocess", "--disable-runtime-dependency-installation",
        "--host", "127.0.0.1", "--port", str(port),
        "--control-api-address", f"127.0.0.1:{free_port()}", "--log-file", str(log),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=neutral,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise FederationError(f"the Flower SuperLink did not start; its log ends:\n{_tail(log)}")
            time.sleep(0.2)
        if not _owns_port(process, port):
            raise FederationError(f"port {port} was taken by another process; run again")
        yield environment
    finally:
        _end_processes(process.pid)


def _flwr(arguments: list[str], environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "flwr"), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def _parse_json(text: str) -> dict[str, Any]:
    """The JSON object in a command's output, which may have lines around it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        parsed = json.loads(text[start : end + 1])
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _submit(
    app: Path, config: Config, supernodes: int, environment: dict[str, str], cwd: Path
) -> str:
    """Submit the run; returns its id."""
    text = INLINE + to_yaml(config)
    cores = os.cpu_count() or 1
    federation = (
        f"num-supernodes={supernodes} client-resources-num-cpus=1 "
        f"init-args-num-cpus={min(cores, supernodes)}"
    )
    if gpus := _gpu_share(min(cores, supernodes)):
        federation += f" client-resources-num-gpus={gpus}"
    run_config = f"config={json.dumps(text)} overrides=''"
    done = _flwr(
        ["run", str(app), "local", "--run-config", run_config, "--federation-config", federation,
         "--format", "json"],
        environment,
        cwd,
    )  # fmt: skip
    answer = _parse_json(done.stdout)
    run_id = answer.get("run-id") or answer.get("run_id")
    if done.returncode != 0 or run_id is None:
        detail = answer.get("error-message") or (done.stdout + done.stderr).strip()[-800:]
        raise FederationError(f"Flower refused the run: {detail}")
    return str(run_id)


def _gpu_share(workers: int) -> float:
    """Fraction of a GPU for each worker, 0 without one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return round(min(1.0, count / workers), 3) if count else 0.0


def _flower_verdict(run_id: str, environment: dict[str, str], cwd: Path) -> tuple[bool, str | None]:
    """(over?, reason if it failed) according to Flower itself."""
    done = _flwr(["list", "local", "--run-id", run_id, "--format", "json"], environment, cwd)
    runs = _parse_json(done.stdout).get("runs") or []
    status = str(runs[0].get("status", "")) if runs else ""
    if not status.startswith(_OVER):
        return False, None
    return True, None if status == f"{_OVER}:completed" else f"Flower says {status}"


class _EventReader:
    """Reads the journal's new events, a complete line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[Event]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        return [json.loads(line) for line in data[:complete].splitlines() if line.strip()]


def _read_status(directory: Path) -> tuple[str, str | None]:
    path = directory / "status.json"
    if not path.exists():
        return "starting", None
    content = json.loads(path.read_text())
    return str(content["state"]), content.get("reason")


def _follow(
    directory: Path, run_id: str, environment: dict[str, str], cwd: Path, on_event: Callable[[Event], None]
) -> RunOutcome:
    """Pass events on until the run is over."""
    reader = _EventReader(directory / "rounds.jsonl")
    asked = time.monotonic()
    while True:
        for event in reader.new():
            on_event(event)
        state, reason = _read_status(directory)
        if state in ("finished", "failed"):
            return RunOutcome(directory, state == "failed", reason)
        if time.monotonic() - asked > LIST_SECONDS:
            over, verdict = _flower_verdict(run_id, environment, cwd)
            asked = time.monotonic()
            if over and _read_status(directory)[0] not in ("finished", "failed"):
                why = verdict or "the server application ended without results"
                return RunOutcome(directory, True, f"{why}; see {directory / 'flower.log'}")
        time.sleep(POLL_SECONDS)


def launch(config: Config, on_event: Callable[[Event], None]) -> RunOutcome:
    """Run ``config`` in a Flower simulation of its own and wait for its end.

    Parameters
    ----------
    config
        A resolved configuration with an absolute ``run.dir``.
    on_event
        Called with every journal event, in order, while the run goes on.

    Raises
    ------
    FederationError
        Flower could not be started or refused the run. A run that starts and fails is reported in the outcome.

    """
    if config.run.dir is None or not Path(config.run.dir).is_absolute():
        raise FederationError("run.dir must be an absolute path before a run is launched")
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in ("status.json", "rounds.jsonl"):
        (directory / stale).unlink(missing_ok=True)
    work = directory / "flower"
    log = directory / "flower.log"
    supernodes = sum(entry.clients for entry in config.types)
    if supernodes < 1:
        raise FederationError("the configuration has no types: name at least one backbone with its clients")
    app = stage_app(work / "app")
    try:
        with _signals_raise(), local_superlink(work, log, config.run.worker_threads) as environment:
            run_id = _submit(app, config, supernodes, environment, work / "cwd")
            outcome = _follow(directory, run_id, environment, work / "cwd", on_event)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return outcome
