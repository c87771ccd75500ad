"""The real thing: Flower's simulation engine, Ray actors, three quantized backbones, both entry points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation.launcher import launch
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.federation.superlink import free_port

BIN = Path(sys.executable).parent
BITS = {"tiny-a@bf16", "tiny-b@int8", "tiny-c@nf4"}


def _ours(marker: str) -> list[psutil.Process]:
    """Processes whose command line or environment names our run directory."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline()) + process.environ().get("FLWR_HOME", "")
        except psutil.Error:
            continue
        if marker in words and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One finished run of the quick preset through the launcher: 6 clients, 3 types, 2 rounds."""
    directory = tmp_path_factory.mktemp("run")
    config = compose("quick", ["alignment.cache=false"])
    config.run.dir = str(directory)
    events: list[dict[str, Any]] = []
    outcome = launch(config, events.append)
    assert not outcome.failed, outcome.reason
    return directory, events


def test_a_simulation_runs_types_of_mixed_bits_together(
    finished: tuple[Path, list[dict[str, Any]]],
) -> None:
    directory, events = finished
    results = json.loads((directory / "results.json").read_text())
    (run,) = results["runs"]
    assert {client["type"] for client in run["clients"]} == BITS
    assert len(run["clients"]) == 6
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]
    assert sum(e["event"] == "train_reply" for e in events) == 12
    # The backbone is untouched before round 1, and training lowers the loss.
    assert run["overall"]["global_loss_mean"] < run["before"]["overall"]["global_loss_mean"]
    # bank of latent 32, inner 8, 3 experts, 16 labels, and the gate, in bf16, plus names and metrics
    parameters = 3 * (8 * 32 + 8 + 16 * 8) + 3 * 33
    # and, in both rounds (the last shared one and the type phase), predictions on 512 anchors
    expected = 2 * parameters + 512 * 16
    # and once, in two rounds, the sums of 16 classes (two views of 32 latents in bf16) and their counts
    expected += (16 * 2 * 32 * 2 + 16 * 4) / 2
    assert expected < run["bytes"]["up_per_client_round"] < expected + 2500
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"


def test_a_finished_run_leaves_nothing_running(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, _ = finished
    assert _ours(str(directory)) == []
    assert not (directory / "flower").exists()


def test_the_same_seed_gives_the_same_bank_bit_for_bit_without_flower(
    finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from client_app.app import app
    from heterotune_flwr.config.compose import to_yaml
    from heterotune_flwr.experiment import run
    from heterotune_flwr.federation.in_process import InProcessGrid
    from heterotune_flwr.flower import Context, RecordDict

    directory, _ = finished
    config = compose("quick", ["alignment.cache=false", f"run.dir={tmp_path}"])
    run_config = {"config": "yaml:" + to_yaml(config), "overrides": ""}
    nodes = [{"partition-id": i, "num-partitions": 6} for i in range(6)]
    context = Context(
        run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config
    )
    run(InProcessGrid(app, nodes, run_config), context)
    name = "banks/heterotune-seed0.safetensors"
    ours, flowers = load_tensors(tmp_path / name), load_tensors(directory / name)
    assert set(ours) == set(flowers)
    for key in ours:
        assert ours[key].tobytes() == flowers[key].tobytes(), key


def test_a_failing_run_says_why_and_exits_with_two(tmp_path: Path) -> None:
    # Nobody can answer in so little time.
    done = subprocess.run(
        [str(BIN / "heterotune"), "run", "quick", "server.query_seconds=0.01", "server.wait_seconds=1",
         "--dir", str(tmp_path)],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the run failed:" in done.stderr
    assert "0 of 6 clients" in done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert _ours(str(tmp_path)) == []


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(BIN / "heterotune"), "run", "quick", "server.rounds=2000", "--dir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "rounds.jsonl").exists():
        assert time.monotonic() < deadline, "the run never began"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped" in output
    assert _ours(str(tmp_path)) == []


def test_flwr_run_streams_the_same_app(tmp_path: Path) -> None:
    app = stage_app(tmp_path / "app")
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    try:
        done = subprocess.run(
            ["flwr", "run", str(app), "--stream", "--federation-config", "num-supernodes=6",
             "--run-config", f"config='quick' overrides='server.rounds=1 run.dir={tmp_path}/run'"],
            env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path,
        )  # fmt: skip
        text = done.stdout + done.stderr
        status = tmp_path / "run" / "status.json"
        assert status.exists(), text
        assert json.loads(status.read_text())["state"] == "finished", text
        assert "Accuracy (%) on the global test" in text
    finally:
        for process in _ours(str(tmp_path)):
            process.kill()
