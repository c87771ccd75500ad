"""A laboratory on this machine: the generated scripts, run as an operator and the nodes' owners would run them."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import heterotune_flwr
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.layout import Deployment
from heterotune_flwr.deploy.registry import flwr, reconcile
from heterotune_flwr.federation.processes import clean_up, start_guard
from heterotune_flwr.federation.superlink import (
    flower_environment,
    free_port,
    tail,
)
from heterotune_flwr.programs import object_in, to_toml

BIN = Path(sys.executable).parent
#: Environment variable that names the unit a process belongs to, as its control group would.
UNIT = "HETEROTUNE_UNIT"


class Lab:
    """SuperLink, SuperExec, (optionally) nginx and nodes of a fresh deployment folder; all end with it."""

    def __init__(
        self, folder: Path, names: list[str], proxy: bool = False, host: str = "127.0.0.1"
    ) -> None:
        self.logs, self.proxy = folder / "logs", proxy
        self.logs.mkdir(parents=True)
        port = free_port()
        internal = free_port() if proxy else port
        self.deployment: Deployment = initialise(
            folder / "lab", [f"{host}:{port}"], names, {}, 90, False, internal_port=internal
        )
        self._temporary = Path(tempfile.mkdtemp(prefix="heterotune-"))
        self.mark = self._temporary.name
        self.environment = {
            **flower_environment(folder / "unused", self._temporary, self.mark),
            "HETEROTUNE_BIN": str(BIN),
            "PYTHONPATH": str(Path(heterotune_flwr.__file__).parents[1]),
        }
        del self.environment["FLWR_HOME"]  # the scripts must set it themselves
        self.environment.pop("HETEROTUNE_WORKER", None)  # on, as it is by default
        self.environment["HETEROTUNE_RUNTIME_DIR"] = str(self._temporary / "runtime")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str | Path, ...]] = {}
        self._guard = start_guard(self.mark, [self._temporary])

    def __enter__(self) -> Lab:
        try:
            self.start_server()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process; may be called twice."""
        for process in self.processes.values():  # nginx overwrites the mark in its environment
            process.terminate()
        clean_up(self.mark, [self._temporary])
        for process in self.processes.values():
            process.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a command whose output goes to a log of that name."""
        self._commands[name] = command
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)), env={**self.environment, UNIT: name}, cwd="/", stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self.processes[name]

    def start_again(self, name: str) -> subprocess.Popen[bytes]:
        """Start what has been started under that name, as its unit would; does not wait for it."""
        return self.start(name, *self._commands[name])

    def start_server(self) -> None:
        """Start SuperLink, SuperExec and (if there is one) nginx."""
        self.start_superlink()
        self.start("superexec", self.deployment.server / "superexec.sh")
        if self.proxy:
            whole = self.logs / "nginx-whole.conf"
            whole.write_text(
                f"pid {self.logs}/nginx.pid; error_log {self.logs}/nginx-error.log; daemon off; events {{}}\n"
                f"http {{ access_log {self.logs}/nginx-access.log; include {self.deployment.server}/nginx.conf; }}\n"
            )
            self.start("nginx", shutil.which("nginx") or "nginx", "-c", whole)

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it answers."""
        process = self.start("superlink", self.deployment.server / "superlink.sh")
        deadline = time.monotonic() + 120
        while not self.healthy():
            assert process.poll() is None, self.log("superlink")
            assert time.monotonic() < deadline, self.log("superlink")
            time.sleep(0.2)

    def healthy(self) -> bool:
        """Whether the SuperLink answers."""
        context = ssl.create_default_context(cafile=str(self.deployment.server / "ca.crt"))
        url = f"https://127.0.0.1:{self.deployment.internal_port}/health"
        with suppress(OSError), urllib.request.urlopen(url, timeout=2, context=context) as reply:
            return reply.status == 200
        return False

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def configure(self, name: str, **client: str | int) -> Path:
        """Fill a node's settings in; returns its folder."""
        place = self.deployment.node(name)
        text = (place / "node.toml").read_text().replace("# port = 9094", f"port = {free_port()}")
        for key, value in client.items():
            key = key.replace("_", "-")
            lines = [line for line in text.splitlines() if line.split(" =")[0] != key]
            at = lines.index("[client]") + 1
            text = "\n".join([*lines[:at], to_toml({key: value}), *lines[at:], ""])
        (place / "node.toml").write_text(text)
        return place

    def start_node(
        self, name: str, place: Path | None = None, before: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a node from its folder; ``before`` is put before the command, to run it elsewhere."""
        return self.start(name, *before, (place or self.deployment.node(name)) / "start.sh")

    def register(self) -> list[str]:
        """Register what is not registered; returns the names."""
        outcome = reconcile(self.deployment)
        assert not outcome.troubles, outcome.troubles
        return outcome.registered

    def online(self) -> set[str]:
        """Names of the nodes that are online."""
        nodes = flwr(self.deployment, "supernode", "list")["nodes"]
        by_id = {node.node_id: name for name, node in self.deployment.nodes.items()}
        return {by_id.get(node["node-id"], "?") for node in nodes if node["status"] == "online"}

    def await_online(self, names: set[str], seconds: float = 240) -> None:
        """Wait until exactly these nodes are online."""
        deadline = time.monotonic() + seconds
        while (seen := self.online()) != names:
            shown = "\n".join(f"{name}: {self.log(name)}" for name in names - seen)
            assert time.monotonic() < deadline, f"online: {seen}\n{shown}"
            time.sleep(1)

    def flwr(self, *arguments: str) -> dict[str, object]:
        """Run ``flwr`` as the operator; returns its JSON."""
        done = subprocess.run(
            [BIN / "flwr", *arguments], env={**self.environment, "FLWR_HOME": str(self.deployment.operator)},
            cwd="/", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return object_in(done.stdout) or {"error": done.stdout + done.stderr}

    def submit(self, app: Path, **run_config: str) -> str:
        """Submit a run of a staged app; returns its id."""
        settings = self.logs / "run.toml"
        settings.write_text(to_toml(run_config))
        answer = self.flwr(
            "run", str(app), "lab", "--run-config", str(settings), "--format", "json"
        )
        assert "run-id" in answer, answer
        return str(answer["run-id"])

    def verdict(self, run_id: str) -> str | None:
        """How a run ended, None while it goes on."""
        runs = self.flwr("list", "lab", "--run-id", run_id, "--format", "json").get("runs")
        status = str(runs[0]["status"]) if isinstance(runs, list) and runs else ""
        return status if status.startswith("finished") else None

    def await_end(self, run_id: str, seconds: float = 900) -> str:
        """Wait for a run's end; returns the verdict."""
        deadline = time.monotonic() + seconds
        while (verdict := self.verdict(run_id)) is None:
            assert time.monotonic() < deadline, self.everything()
            time.sleep(3)  # asking costs a second of a core
        return verdict

    def everything(self) -> str:
        """The ends of all logs."""
        return "\n".join(
            f"--- {path.name}\n{tail(path, 40)}" for path in sorted(self.logs.glob("*.log"))
        )


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C would, so that what it has started and set up goes with it."""

    def end(*_: object) -> None:
        raise SystemExit("ended by SIGTERM")

    signal.signal(signal.SIGTERM, end)


def has_nginx() -> bool:
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") is not None
