"""A Flower SuperLink of one's own for the length of a run, and the ``flwr`` commands against it.

Own ``FLWR_HOME``, a free port, a neutral working directory, no run-time installation of dependencies, no telemetry.
(A bare ``flwr run`` starts a SuperLink that lives for ever and keeps the directory and environment of whoever
started it first.)
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation.processes import MARK, clean_up, on_signals, start_guard
from heterotune_flwr.programs import flwr_json, plain_environment, program, search_path, to_toml

START_SECONDS = 60.0
LOG_SECONDS = 5.0
TAIL_LINES = 15
#: Flower's own name for a run that is over, and of the process that runs a simulation.
_OVER = "finished"
_SIMULATION = "flwr-simulation"


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _absolute(paths: str) -> str:
    return os.pathsep.join(
        str(Path(p).expanduser().absolute()) for p in paths.split(os.pathsep) if p
    )


def flower_environment(home: Path, temporary: Path, mark: str, threads: int = 1) -> dict[str, str]:
    """Environment of every process of a run.

    Relative search paths become absolute: the processes do not start where the user stands.
    """
    package = Path(__file__).resolve().parents[1]
    environment = {
        **plain_environment(),
        MARK: mark,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(temporary),  # short: it holds sockets; also hides other Ray clusters
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "PATH": search_path(),
        "PYTHONUNBUFFERED": "1",
        "HETEROTUNE_ASSETS": os.pathsep.join(
            filter(None, [os.environ.get("HETEROTUNE_ASSETS", ""), str(package / "assets")])
        ),
    }
    environment.pop("RAY_ADDRESS", None)
    for name in ("PYTHONPATH", "HETEROTUNE_CACHE", "HETEROTUNE_ASSETS"):
        if environment.get(name):
            environment[name] = _absolute(environment[name])
    return environment


class SuperLink:
    """A SuperLink in simulation mode of one's own; use as a context manager.

    ``work`` is for Flower's home and the neutral working directory, and removed at the end; ``log`` takes what all
    processes of the run print; ``threads`` is ``OMP_NUM_THREADS`` of the workers.
    """

    def __init__(self, work: Path, log: Path, threads: int = 1) -> None:
        self.work, self.log = work, log
        self.cwd = work / "cwd"
        self.mark = uuid.uuid4().hex
        temporary = Path(tempfile.mkdtemp(prefix="heterotune-"))
        self.environment = flower_environment(work / "home", temporary, self.mark, threads)
        self._folders = (work, temporary)
        self._guard: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._streamer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it and wait until it answers (FederationError with the log's end if it does not)."""
        try:
            self._guard = start_guard(self.mark, self._folders)
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process of the run and remove its working folders."""
        self.close()

    def _start(self) -> None:
        port = free_port()
        home = Path(self.environment["FLWR_HOME"])
        for folder in (home, self.cwd):
            folder.mkdir(parents=True, exist_ok=True)
        # An explicit address: for Flower's own "local" connection the CLI starts a SuperLink that stays.
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "run"\n\n[superlink.run]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        command = [
            program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
            "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not healthy(port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise FederationError(
                    f"the Flower SuperLink did not start; the end of {self.log}:\n{tail(self.log)}"
                )
            time.sleep(0.1)
        if not _owns_port(self._process.pid, port):
            raise FederationError(f"port {port} was taken by another process; run again")

    def close(self) -> None:
        """End every process of the run and remove its working folders; may be called twice."""
        with on_signals(
            signal.SIG_IGN, "SIGINT", "SIGTERM", "SIGHUP"
        ):  # not cut short by a second Ctrl-C
            clean_up(self.mark, self._folders)
            for process in (self._streamer, self._process):
                if process is not None:
                    process.wait()
            if self._guard is not None and self._guard.stdin is not None:
                self._guard.stdin.close()
                self._guard.wait()

    def flwr(self, *arguments: str) -> tuple[dict[str, Any], str]:
        """Run ``flwr`` against this SuperLink: what it answers, and why it failed (:func:`.programs.flwr_json`)."""
        return flwr_json(*arguments, environment=self.environment, cwd=self.cwd)

    def submit(self, app: Path, run_config: Mapping[str, str], federation: str) -> str:
        """Submit a run of the app in this folder; returns its id."""
        # A file: `key=value` arguments are cut at every quotation mark inside a value.
        settings = self.work / "run.toml"
        settings.write_text(to_toml(run_config))
        answer, trouble = self.flwr(
            "run", str(app), "run", "--run-config", str(settings), "--federation-config", federation
        )
        if trouble:
            raise FederationError(f"Flower refused the run: {trouble}")
        return str(answer["run-id"])

    def stream_log(self, run_id: str) -> None:
        """Append what the run's server and clients print to the log, from now on.

        The simulation's output does not pass through the SuperLink's own; Flower keeps it apart.
        """
        with self.log.open("ab") as log:
            self._streamer = subprocess.Popen(
                [program("flwr"), "log", run_id, "run", "--stream"],
                env=self.environment, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def await_log(self) -> None:
        """Give the run's last lines time to arrive."""
        if self._streamer is not None:
            with suppress(subprocess.TimeoutExpired):
                self._streamer.wait(LOG_SECONDS)

    def verdict(self, run_id: str) -> str | None:
        """How the run ended according to Flower (``finished:failed``, ...), None while it goes on."""
        runs = self.flwr("list", "run", "--run-id", run_id)[0].get("runs") or []
        status = str(runs[0].get("status", "")) if runs else ""
        return status if status.startswith(_OVER) else None

    def exit_code(self) -> int | None:
        """Exit code of the SuperLink itself, None while it runs."""
        return None if self._process is None else self._process.poll()

    def simulating(self) -> bool:
        """Whether the process that runs the simulation is there."""
        if self._process is None:
            return False
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if any(_SIMULATION in part for part in child.cmdline()[:3]):
                        return bool(child.status() != psutil.STATUS_ZOMBIE)
        return False


def healthy(port: int) -> bool:
    """Whether a SuperLink answers on its health port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _owns_port(pid: int, port: int) -> bool:
    """Whether the listening socket belongs to the process we started (or a child of it)."""
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            if any(
                c.status == psutil.CONN_LISTEN and c.laddr.port == port
                for c in process.net_connections(kind="tcp")
            ):
                return True
    return False


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, empty ones left out."""
    if not path.exists():
        return ""
    text = path.read_text(errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
