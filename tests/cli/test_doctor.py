"""``heterotune doctor``: every trouble of a machine is told with its mend."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple

import pytest
from typer.testing import CliRunner

from heterotune_flwr import doctor
from heterotune_flwr.cli import app
from heterotune_flwr.deploy.versions import MISSING, installed_versions
from heterotune_flwr.errors import FederationError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache" / "of" / "mine"))
    monkeypatch.setenv("HOME", str(tmp_path))


def found():
    return {finding.name: finding for finding in doctor.examine()}


def test_a_good_machine_has_no_fault(tmp_path):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    answer = json.loads(done.output)
    assert done.exit_code == 0, done.output
    assert answer["ready"]
    states = {check["name"]: check["state"] for check in answer["checks"]}
    places = ["cache", "runs", "temporary", "kept", "models", "ports"]
    assert list(states) == ["python", "libraries", "flower", "device", "memory", *places]
    assert not (tmp_path / "cache").exists()  # it looks, and makes nothing


def test_wrong_and_missing_libraries_are_named_with_what_is_supported(monkeypatch):
    wrong = {"transformers": "5.24.1", "ray": MISSING}
    monkeypatch.setattr(
        doctor, "installed_versions", lambda names: {**installed_versions(names), **wrong}
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "something is in the way: 2 to mend" in done.output
    assert 'pip install "transformers<5.24,>=5.0"' in done.output
    assert "ray        is missing" in done.output


def test_a_full_disk_is_a_fault_and_a_cache_larger_than_what_is_left_a_warning(
    monkeypatch, tmp_path
):
    kept = tmp_path / "cache" / "of" / "mine" / "store" / "nf4-0" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(3000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10_000, 9_000, 1_000))
    checks = found()
    assert checks["cache"].state == checks["runs"].state == "fail"
    assert "make room" in checks["cache"].mend
    assert checks["kept"].state == "warn"
    assert "states --clear" in checks["kept"].mend


def test_a_driver_without_a_gpu_in_torch_is_a_warning(monkeypatch, tmp_path):
    loaded = tmp_path / "version"
    loaded.write_text("NVRM version: 1")
    monkeypatch.setattr(doctor, "_NVIDIA", loaded)
    device = found()["device"]
    assert device.state == ("ok" if not device.message.startswith("CPU") else "warn")


def test_a_port_of_a_deployment_that_is_taken_is_a_warning(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "INTERNAL_PORT", taken.getsockname()[1])
        ports = found()["ports"]
    assert ports.state == "warn"
    assert "SuperLink of a server" in ports.message


def test_programs_and_models_that_are_missing_are_faults(monkeypatch):
    def gone(name):
        raise FederationError(f"{name} is nowhere; install heterotune-flwr anew")

    monkeypatch.setattr(doctor, "program", gone)
    monkeypatch.setattr(doctor, "is_present", lambda name: name != "tiny-b")
    checks = found()
    assert checks["flower"].state == checks["models"].state == "fail"
    assert "tiny-b" in checks["models"].message
