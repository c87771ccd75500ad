"""An upgrade as docs/deploy.md describes it, with the package installed by pip in the node's own environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks.deployment.lab import BIN, Lab
from benchmarks.deployment.runs import configuration
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app

ROOT = Path(__file__).resolve().parents[2]
NODE = "clinic"
TYPES = "[{backbone: tiny-a, bits: bf16, clients: 1}]"
#: What Flower and the node start by name.
SCRIPTS = ("flower-supernode", "flower-superexec", "flwr-clientapp", "flwr")
CHANGE = "# another version\n"


def wheel(folder: Path, changed: bool) -> Path:
    """A wheel of this checkout; ``changed``: with other code, as an older version would have."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "results", "tests"))  # fmt: skip
    if changed:
        with (tree / "heterotune_flwr" / "errors.py").open("a") as stream:
            stream.write(CHANGE)
    pip(Path(sys.executable), "wheel", "--no-deps", "-w", str(folder), str(tree))
    (made,) = folder.glob("*.whl")
    return made


def pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", *arguments], capture_output=True, text=True, cwd="/"
    )
    if done.returncode and "wheel" in arguments:
        pytest.skip(f"no wheel can be built here (no network?): {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr


def environment(folder: Path) -> Path:
    """A virtual environment without this package, with everything else that this one has; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in SCRIPTS:
        text = (BIN / name).read_text().split("\n", 1)[1]
        (folder / "bin" / name).write_text(f"#!{python}\n{text}")
        (folder / "bin" / name).chmod(0o755)
    return python


def install(python: Path, made: Path) -> None:
    pip(python, "install", "--no-deps", "--force-reinstall", "--no-index", str(made))


def check(lab: Lab, python: Path) -> tuple[int, dict[str, str]]:
    """``heterotune node check`` in the node's environment: exit code, and state by name of the finding."""
    done = subprocess.run(
        [python.parent / "heterotune", "node", "check", lab.deployment.node(NODE) / "node.toml", "--json"],
        capture_output=True, text=True, cwd="/", env=lab.environment | {"PYTHONPATH": ""},
    )  # fmt: skip
    findings = json.loads(done.stdout)["checks"]
    return done.returncode, {finding["name"]: finding["state"] for finding in findings}


def start(lab: Lab, python: Path) -> None:
    lab.start_node(NODE, before=["env", f"HETEROTUNE_BIN={python.parent}", "PYTHONPATH="])
    lab.await_online({NODE})


def run(lab: Lab, app: Path, directory: Path) -> str:
    config = configuration(directory, types=TYPES)
    return lab.await_end(
        lab.submit(app, config=config, overrides="server.min_clients=1 server.wait_seconds=5")
    )


@pytest.mark.slow
def test_a_node_refuses_the_new_version_until_it_is_upgraded(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = wheel(tmp_path / "old", changed=True), wheel(tmp_path / "new", changed=False)
    python = environment(tmp_path / "venv")
    install(python, old)
    earlier, later = stage_app(tmp_path / "earlier"), stage_app(tmp_path / "later")
    with (earlier / "heterotune_flwr" / "errors.py").open("a") as stream:
        stream.write(CHANGE)
    with Lab(tmp_path, [NODE]) as lab:
        place = lab.configure(NODE, client_id=NODE, backbone="tiny-a", bits="bf16", threads=1)
        rows = [{"text": f"text number {i}", "label": ["admin", "mail"][i % 2]} for i in range(32)]
        (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lab.register()
        # The old version's own run goes; then the server is upgraded.
        start(lab, python)
        assert run(lab, earlier, tmp_path / "first") == "finished:completed", lab.everything()
        kept = set(place.rglob("*.safetensors"))
        assert run(lab, later, tmp_path / "refused") == "finished:failed"
        status = json.loads((tmp_path / "refused" / "status.json").read_text())
        assert "install the server's version on the node" in status["reason"]
        assert lab.online() == {NODE}
        code, findings = check(lab, python)
        assert (code, findings["code"]) == (1, "fail")
        # The guide: pip install --upgrade, the new manifest.json (it lies there), node check, restart.
        install(python, new)
        code, findings = check(lab, python)
        assert findings["code"] == "ok", findings
        lab.processes[NODE].terminate()
        lab.processes[NODE].wait(60)
        start(lab, python)
        assert run(lab, later, tmp_path / "second") == "finished:completed", lab.everything()
        assert kept <= set(place.rglob("*.safetensors"))
    rounds = [e for e in read_events(tmp_path / "second" / "rounds.jsonl") if e["event"] == "round"]
    assert [event["clients"] for event in rounds] == [1, 1]
