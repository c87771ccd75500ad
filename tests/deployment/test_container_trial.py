"""The trial of deploy/docker without Docker: what its images install, and its services' own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from containers import FOLDER, ROOT, command_of, services, stages

from heterotune_flwr.federation.processes import MARK, clean_up, start_guard
from heterotune_flwr.federation.superlink import free_port
from heterotune_flwr.programs import plain_environment
from heterotune_flwr.reporting.measures import load_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
SERVICES = services()


class Machine:
    """Containers as processes: a virtual environment an image, folders in the place of volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lab = folder, folder / "lab"
        self.temporary = Path(tempfile.mkdtemp(prefix="heterotune-"))
        self.mark = self.temporary.name
        port = free_port()
        internal = free_port() if shutil.which("nginx") else port
        self.own = {  # what a container has for itself and this machine has once -> what stands for it here
            "server:8443": f"localhost:{port} --internal-port {internal}",
            "127.0.0.1:9093": f"127.0.0.1:{internal}",
            "/opt/heterotune": str(folder / "opt"),
            "/wheels": str(folder / "wheels"),
            "/src": str(folder / "src"),
            "/lab": str(self.lab),
            "/usr/sbin/nginx": shutil.which("nginx") or "",
        }
        self.guard = start_guard(self.mark, [self.temporary])

    def here(self, text: str) -> str:
        """A text of a container with what stands here for it."""
        pattern = "|".join(re.escape(word) for word in self.own)
        return re.sub(rf"(?:{pattern})(?![\w.-])", lambda found: self.own[found[0]], text)

    def environment(self, target: str) -> dict[str, str]:
        """Of a container of an image."""
        path = f"{self.folder / target / 'bin'}{os.pathsep}{os.environ['PATH']}"
        inherited = {
            name: value for name, value in plain_environment().items() if name != "PYTHONPATH"
        }
        image = {name: self.here(value) for name, value in stages()[target].environment().items()}
        return {**inherited, **image, "PATH": path, MARK: self.mark, "OMP_NUM_THREADS": "1"}

    def build(self, target: str) -> None:
        """Do what an image's Dockerfile does with pip, in an environment of its own."""
        subprocess.run([sys.executable, "-m", "venv", self.folder / target], check=True)
        (line,) = [text for text in stages()[target].all("RUN") if "pip " in text]
        line = re.sub(r"--mount=\S+ ", "", line).replace('--index-url "$TORCH_INDEX" ', "")
        self.run(target, ["sh", "-c", line])

    def run(self, target: str, words: list[str]) -> str:
        """Run a command to its end; returns what it prints."""
        done = subprocess.run(
            [self.here(word) for word in words], env=self.environment(target), cwd=self.folder, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout[-3000:])
        return done.stdout

    def start(self, name: str, words: list[str]) -> None:
        """Start a service's command."""
        target = SERVICES[name]["build"]["target"]
        with (self.folder / f"{name}.log").open("wb") as log:
            subprocess.Popen(
                [self.here(word) for word in words], env=self.environment(target), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        clean_up(self.mark, [self.temporary])
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        self.guard.wait()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    made = Machine(tmp_path_factory.mktemp("trial"))
    context = [
        line[1:]
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for name in context:
        target = made.folder / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    (made.folder / "opt").mkdir()
    for target in ("server", "node"):
        for line in stages()[target].all("COPY"):
            for source in line.split()[:-1]:
                copy = made.folder / "opt" / Path(source).name
                text = (ROOT / source).read_text().replace("/tmp/", f"{made.temporary}/")
                copy.write_text(made.here(text))
    (line,) = stages()["wheel"].all("RUN")
    subprocess.run(
        ["sh", "-c", made.here(line)], check=True, env={**os.environ, "PATH": search_path()}
    )
    made.build("server")
    made.build("node")
    yield made
    made.close()


def search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_the_trial_runs_with_a_server_without_torch(machine):
    listed = machine.run("server", ["pip", "list", "--format", "freeze"])
    assert "flwr==" in listed
    assert not re.search(r"^(torch|transformers|ray)==", listed, flags=re.M)
    machine.run("server", command_of(SERVICES["setup"]))
    machine.run("server", command_of(SERVICES["setup"]))  # may be given again
    if shutil.which("nginx"):
        machine.start("server", command_of(SERVICES["server"]))
    machine.start("superlink", command_of(SERVICES["superlink"]))
    _, *check = SERVICES["superlink"]["healthcheck"]["test"]
    deadline = time.monotonic() + 60
    while subprocess.run(
        [machine.here(word) for word in check],
        env=machine.environment("server"),
        check=False,
        capture_output=True,
    ).returncode:
        assert time.monotonic() < deadline, (machine.folder / "superlink.log").read_text()
        time.sleep(0.5)
    machine.start("superexec", command_of(SERVICES["superexec"]))
    machine.run("server", command_of(SERVICES["register"]))
    for name in ("n1", "n2"):
        place = machine.lab / "nodes" / name
        settings = (
            (place / "node.toml").read_text().replace("# port = 9094", f"port = {free_port()}")
        )
        (place / "node.toml").write_text(settings)
        machine.own["/node"] = str(place)
        assert "ready to join" in machine.run(
            "node", ["heterotune", "node", "check", "/node/node.toml"]
        )
        machine.start(name, command_of(SERVICES[name]))
    said = machine.run(
        "server",
        [
            "heterotune",
            "deploy",
            "run",
            "/lab",
            "demo",
            "server.rounds=2",
            "run.compare=[heterotune]",
        ],
    )
    found = re.search(r"it writes to (\S+)", said)
    assert found, said
    directory = Path(found[1])
    deadline = time.monotonic() + 600
    while not (directory / "results.json").exists():
        logs = "\n".join(
            (machine.folder / f"{name}.log").read_text()[-2000:]
            for name in ("superexec", "n1", "n2")
        )
        status = directory / "status.json"
        assert not (status.exists() and "failed" in status.read_text()), status.read_text() + logs
        assert time.monotonic() < deadline, logs
        time.sleep(1)
    (run,) = load_results(directory)["runs"]
    assert {client["client_id"] for client in run["clients"]} == {"n1", "n2"}
    assert "n2" in machine.run("server", ["heterotune", "status", f"/lab/runs/{directory.name}"])
