"""Images, the trial of compose.yaml and the Slurm job: their commands are the package's own. No Docker is needed."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import typer.main
from containers import FOLDER, ROOT, command_of, requirements, services, stages

from heterotune_flwr.cli import app
from heterotune_flwr.deploy.folder import initialise
from heterotune_flwr.deploy.layout import INTERNAL_PORT, Deployment

SERVICES = services()
SLURM = ROOT / "deploy" / "slurm" / "node.sbatch"
#: Imports nothing of what server.txt leaves out, and with it what a server needs.
WITHOUT_THE_REST = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"{{name}} is not in server.txt", name=name)
sys.meta_path.insert(0, Refuse())
import server_app.app, heterotune_flwr.cli
from heterotune_flwr.deploy import explain, folder, registry, rotation, submit
from heterotune_flwr.federation import maps_service
from heterotune_flwr.reporting import results, status, tables
from heterotune_flwr.config.compose import compose
from heterotune_flwr.strategies.build import check_strategies
check_strategies(compose("demo"))
"""


def cli_takes(words: list[str]) -> None:
    """Click reads the words as the command would; it raises where a word or option is unknown."""
    assert words[0] == "heterotune"
    group, rest, context = typer.main.get_command(app), words[1:], None
    while hasattr(group, "commands") and rest and not rest[0].startswith("-"):
        context = group.make_context(group.name, [rest[0]], parent=context, resilient_parsing=True)
        group, rest = group.commands[rest[0]], rest[1:]
    group.make_context(group.name, list(rest), parent=context, resilient_parsing="--help" in rest)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Deployment:
    """The deployment folder that the trial makes."""
    folder = tmp_path_factory.mktemp("trial") / "lab"
    return initialise(folder, ["server:8443"], ["n1", "n2"], {}, 90, False)


@pytest.mark.parametrize("target", ["server", "node"])
def test_an_image_runs_the_command_as_an_ordinary_user(target):
    stage = stages()[target]
    assert stage.last("USER") == "heterotune"
    assert "--uid 10001" in " ".join(stage.all("RUN"))
    instructions = [word for word, _ in stage.instructions]
    assert instructions.index("USER") > max(
        i for i, word in enumerate(instructions) if word == "RUN"
    )
    cli_takes(stage.command())


def test_an_image_sets_nothing_that_nobody_reads():
    known = " ".join(path.read_text() for path in (ROOT / "heterotune_flwr").rglob("*.py"))
    for stage in stages().values():
        used = " ".join(text for word, text in stage.instructions if word == "RUN")
        for name in stage.environment():
            assert name.startswith(("PYTHON", "PIP_")) or name in known or f"${name}" in used, name


def test_images_copy_what_there_is_and_nothing_private_can_get_in():
    patterns = [
        line
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    for name in allowed:
        assert (ROOT / name).exists(), name
    for stage in stages().values():
        for text in stage.all("COPY"):
            for source in text.split()[:-1]:
                inside = source == "." or any(
                    source == a or source.startswith(f"{a}/") for a in allowed
                )
                assert inside, source
                assert (ROOT / source).exists(), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    needed = [*packages["packages"], *packages["force-include"], "pyproject.toml", "README.md"]
    assert {*needed} <= {*allowed}  # the wheel is built of what the image is given
    assert not [
        name for name in allowed if fnmatch.fnmatch(name, "*runs*") or name in ("tests", "docs")
    ]


def test_a_server_needs_no_more_than_its_list_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [need.replace("[simulation]", "") for need in project["dependencies"]]
    listed = requirements()
    assert {*listed} <= {*needs}
    left_out = {re.match(r"[\w-]+", need)[0] for need in needs if need not in listed}
    assert {"torch", "transformers", "peft"} <= left_out
    code = WITHOUT_THE_REST.format(hidden=repr(left_out | {"ray"}))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_something_that_is_there(name, lab):
    service = SERVICES[name]
    words = command_of(service)
    if words[0] == "heterotune":
        cli_takes([word.replace("/lab", str(lab.folder)) for word in words])
    for word in words:
        if word.startswith("/lab/"):
            assert os.access(lab.folder / word.removeprefix("/lab/"), os.X_OK), word
        elif word.startswith("/opt/heterotune/"):
            copied = " ".join(stages()["server"].all("COPY"))
            assert f"deploy/docker/{Path(word).name}" in copied, word
    for other in service.get("depends_on", {}):
        assert other in SERVICES
    assert service.get("network_mode", "service:server").removeprefix("service:") in SERVICES
    for volume in service["volumes"]:
        if isinstance(volume, dict):
            assert (lab.folder / volume["volume"]["subpath"] / "node.toml").is_file()


def test_nodes_find_the_server_by_the_name_of_its_service(lab):
    made = (FOLDER / "trial.sh").read_text()
    address = f"server:{lab.port}"
    assert f"--server {address}" in made
    assert "server" in SERVICES
    assert SERVICES["server"]["ports"] == [f"127.0.0.1:{lab.port}:{lab.port}"]
    assert f'address = "{address}"' in (lab.node("n1") / "node.toml").read_text()
    code = SERVICES["superlink"]["healthcheck"]["test"][-1]
    compile(code, "healthcheck", "exec")
    assert f"127.0.0.1:{INTERNAL_PORT}/health" in code


@pytest.fixture
def slurm(tmp_path):
    """Runs the job's script with a command that only notes how it is called, as the ``heterotune`` of a machine."""
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    notes = tmp_path / "notes"
    sleeper = shutil.which("sleep")
    texts = {
        "heterotune": f'echo "heterotune $*" >> {notes}; [ "$2" = check ] && exit "${{CHECK:-0}}"; '
        f'[ -z "${{DIES:-}}" ] || exit 3; exec {sleeper} 60',
        "scontrol": f'echo "scontrol $*" >> {notes}',
        "sleep": f'echo "sleep $*" >> {notes}; exec {sleeper} 60',
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)

    def start(**environment):
        environment = {**os.environ, "SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path), **environment}
        command = ["bash", str(SLURM), "node", str(tools.parent)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ), notes

    return start


def await_note(notes: Path, words: str) -> list[str]:
    deadline = time.monotonic() + 30
    while not notes.exists() or words not in notes.read_text():
        assert time.monotonic() < deadline, words
        time.sleep(0.02)
    return notes.read_text().splitlines()


def test_a_slurm_job_checks_joins_and_is_submitted_again_when_its_time_is_up(slurm, tmp_path):
    process, notes = slurm()
    await_note(notes, "node start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    node = "node/node.toml"
    assert notes.read_text().splitlines() == [
        f"heterotune node check {node}", f"heterotune node start {node}", "scontrol requeue 7",
    ]  # fmt: skip
    assert not list(tmp_path.glob("tmp.*"))
    for line in notes.read_text().splitlines()[:2]:
        cli_takes(line.split())


def test_a_slurm_job_starts_a_node_again_that_has_ended_and_none_that_does_not_fit(slurm):
    process, notes = slurm(DIES="yes")
    await_note(notes, "sleep 75")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert b"exit code 3" in out
    notes.unlink()
    process, notes = slurm(CHECK="1")
    assert process.wait(30) == 1
    assert "node start" not in notes.read_text()
