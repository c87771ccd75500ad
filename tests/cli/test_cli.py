"""The command line: help that teaches, one-line errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_installed_command_lists_every_command() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "heterotune"), "--help"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0
    for command in ("run", "report", "config", "fetch", "backbones", "align", "states"):
        assert command in done.stdout


def test_config_lists_presets_and_shows_a_resolved_one(heterotune: Call) -> None:
    assert "demo" in heterotune("config").stdout
    shown = heterotune("config", "demo", "server.rounds=3").stdout
    assert "rounds: 3" in shown
    assert "_component_: heterotune_flwr.strategies.heterotune.HeteroTune" in shown


def test_config_explains_settings(heterotune: Call) -> None:
    shown = heterotune("config", "--explain", "train.local_steps", "max_length").stdout
    assert "train.local_steps = 12 [steps]   (a whole number of at least 1)" in shown
    assert "data.max_length = 128 [tokens]" in shown
    assert "exchange.codec" in heterotune("config", "--explain").stdout
    assert heterotune("config", "--explain", "--markdown").stdout.startswith("# Settings")


def test_a_dry_run_checks_and_shows_what_would_run(heterotune: Call, tmp_path: Path) -> None:
    compared = "run.compare=[within_type]"
    done = heterotune("run", "quick", compared, "--dry-run", "--dir", str(tmp_path / "x"))
    assert done.returncode == 0, done.stderr
    assert f"within_type; 2 rounds each, seeds 0; into {tmp_path / 'x'}" in done.stdout
    assert "6 clients" in done.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "demoo"], "did you mean 'demo'"),
        (["run", "demo", "train.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["run", "demo", "types.0.backbone=smollm3"], "did you mean 'smollm2'"),
        (["report", "/nowhere"], "results.json"),
        (["config", "--explain", "train.lr"], "did you mean 'train.learning_rate'"),
        (["fetch", "gemma3-270m"], "--accept-gemma-terms"),
        (["fetch", "lama"], "unknown backbone"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_one(
    heterotune: Call, arguments: list[str], words: str
) -> None:
    done = heterotune(*arguments)
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr


def test_a_directory_that_cannot_be_used_is_refused_before_anything_starts(
    heterotune: Call, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "results.json").write_text("{}")
    for directory, words in ((tmp_path / "file", "no directory"), (tmp_path, "holds the results")):
        for more in ([], ["--dry-run"]):
            done = heterotune("run", "quick", "--dir", str(directory), *more)
            assert done.returncode == 1
            assert words in done.stderr
            assert "starting" not in done.stdout


def test_align_computes_maps_that_a_run_finds_in_the_cache(
    heterotune: Call, tmp_path: Path
) -> None:
    small = "alignment.count=80 alignment.components=16 types.0.clients=1 types.1.clients=1 types.2.clients=1"
    within = (*small.split(), "run.compare=[within_type]")
    first = heterotune("align", "quick", *within)
    assert first.returncode == 0, first.stderr
    assert "reading 80 anchors with tiny-a@bf16\n" in first.stdout
    second = heterotune("align", "quick", *within)
    assert "reading" not in second.stdout
    assert second.stdout.count("canonical correlation") == 3
    both = heterotune(
        "align", "quick", *small.split()
    )  # heterotune's discriminant reads whole texts besides
    assert both.stdout.count("whole texts") == both.stdout.count("reading") == 3
    from client_app.app import app
    from heterotune_flwr.config.compose import compose
    from heterotune_flwr.experiment import run
    from heterotune_flwr.federation.in_process import InProcessGrid
    from heterotune_flwr.flower import Context, RecordDict

    run_config = {
        "config": "quick",
        "overrides": f"run.dir={tmp_path} server.rounds=1 data.global_test_examples=16 train.local_steps=1 {small}",
    }
    nodes = [{"partition-id": i, "num-partitions": 3} for i in range(3)]
    context = Context(
        run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config
    )
    run(InProcessGrid(app, nodes, run_config), context)
    events = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    (aligned,) = [event for event in events if event["event"] == "align"]
    assert aligned["cached"]
    assert aligned["bytes_up"] == 0
    again = compose(str(tmp_path / "config.yaml"))  # repeats the run, in a directory of its own
    assert again.run.dir is None
    assert again.server.rounds == 1


def test_states_are_shown_and_cleared(
    heterotune: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    kept = tmp_path / "states" / "ab" / "abc.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x" * 2_000_000)
    assert "1 tables, 0.002 of 20 GB" in heterotune("states").stdout
    assert "removed 0.002 GB" in heterotune("states", "--clear").stdout
    assert not kept.exists()


def test_ctrl_c_while_the_command_is_imported_is_a_quiet_end() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from heterotune_flwr.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
