"""A real deployment: SuperLink, three SuperNodes (one a guest), a fresh ClientApp process for every message."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.federation import superlink as superlinks
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.federation.superlink import SuperLink, free_port, tail
from heterotune_flwr.programs import program, to_toml
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.worker.cli import ask_status
from heterotune_flwr.worker.places import Place

RUN = """yaml:
groups: {{types: tiny, data: debian_sections, method: dema, alignment: labels, train: small_data,
  exchange: bf16, server: deployment}}
strategies:
  - heterotune:
      predictions: {{anchors: 16, pool: 32, batch: 8, guest_anchors: 64, guest_steps: 8}}
types: [{{backbone: tiny-a, bits: bf16, clients: 1}}, {{backbone: tiny-b, bits: bf16, clients: 1}}]
data: {{global_test_examples: 32}}
method: {{latent: 32, inner: 8}}
alignment: {{count: 200, components: 64}}
train: {{local_steps: 3}}
server: {{rounds: 2, evaluate_every: 1, min_clients: 3}}
run: {{name: deployed, dir: {directory}}}
"""


class Deployment(SuperLink):
    """A SuperLink for SuperNodes; all of it ends with it."""

    def _start(self) -> None:
        port, home = free_port(), Path(self.environment["FLWR_HOME"])
        for folder in (home, self.cwd):
            folder.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{port}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "run"\n\n[superlink.run]\naddress = "{address}"\ninsecure = true\n'
        )
        self.address = address
        self._process = self.start(
            "flower-superlink", "--insecure", "--isolation", "subprocess",
            "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not superlinks.healthy(port):
            assert self._process.poll() is None, tail(self.log)
            assert time.monotonic() < deadline, tail(self.log)
            time.sleep(0.1)

    def start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [program(command), *arguments], env=self.environment, cwd=self.cwd,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def add_node(self, config: dict[str, str]) -> None:
        settings = " ".join(f'{key}="{value}"' for key, value in config.items())
        self.start(
            "flower-supernode", "--insecure", "--superlink", self.address, "--host", "127.0.0.1",
            "--port", str(free_port()), "--node-config", settings,
        )  # fmt: skip

    def run_app(self, app: Path, config: str) -> str:
        settings = self.work / "run.toml"
        settings.write_text(to_toml({"config": config, "overrides": ""}))
        answer, trouble = self.flwr("run", str(app), "run", "--run-config", str(settings))
        assert not trouble
        return str(answer["run-id"])


@pytest.mark.slow
def test_every_backbone_of_a_deployment_is_loaded_once(tmp_path, monkeypatch):
    runtime = tempfile.mkdtemp(prefix="ht-")
    monkeypatch.setenv("HETEROTUNE_RUNTIME_DIR", runtime)
    monkeypatch.delenv("HETEROTUNE_WORKER")
    rows = [{"text": e.text, "label": e.label} for e in training_pool(DataConfig())[:64]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    app = stage_app(tmp_path / "app")
    own = {"data": str(tmp_path / "data.jsonl")}
    nodes = {
        ("tiny-a", "bf16"): own,
        ("tiny-b", "bf16"): own,
        ("tiny-a", "int8"): {"guest": "yes"},  # a model, and nothing else
    }
    states = {node: tmp_path / "-".join(node) for node in nodes}
    try:
        with Deployment(tmp_path / "flower", tmp_path / "flower.log") as deployment:
            for (name, bits), more in nodes.items():
                deployment.add_node(
                    {"client-id": f"of-{name}-{bits}", "backbone": name, "bits": bits,
                     "state-dir": str(states[name, bits]), **more}
                )  # fmt: skip
            run_id = deployment.run_app(app, RUN.format(directory=tmp_path / "run"))
            deadline = time.monotonic() + 400
            while (verdict := deployment.verdict(run_id)) is None:
                assert time.monotonic() < deadline, tail(deployment.log, 60)
                time.sleep(1)
            assert verdict == "finished:completed", tail(deployment.log, 60)
            statuses = {node: ask_status(Place.of(state)) for node, state in states.items()}
        for node, status in statuses.items():
            assert status is not None
            assert status["loads"]["@".join(node)]["loads"] == 1
            assert status["jobs_failed"] == 0
            # describe, align, 2 x train (a guest: one), 2 x evaluate
            assert status["jobs_done"] >= (5 if "guest" in nodes[node] else 6)
            assert (states[node] / "worker.log").read_text().count("ready, pid") == 1
            with suppress(psutil.NoSuchProcess):  # ended with the deployment's other processes
                psutil.Process(status["pid"]).wait(10)
        (run,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
        assert len(run["clients"]) == 3
        (taught,) = [
            e for e in read_events(tmp_path / "run" / "rounds.jsonl") if e["event"] == "guests"
        ]
        assert (taught["types"], taught["clients"]) == (["tiny-a@int8"], 1)
        before, after = (
            r["types"]["tiny-a@int8"]["global_loss_mean"] for r in (run["before"], run)
        )
        assert after != before
    finally:
        shutil.rmtree(runtime)
