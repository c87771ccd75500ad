"""A run's directory, settings, events and app, before Flower is started."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.federation.launcher import (
    EventReader,
    Resources,
    check_directory,
    launch,
    plan_resources,
    prepared,
)
from heterotune_flwr.federation.resume import FOLLOWER
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.federation.superlink import tail
from heterotune_flwr.programs import program, to_toml
from heterotune_flwr.runs import new_config

# The config value holds both kinds of quotes, a line break and an emoji: they must arrive unharmed.
SETTINGS = 'yaml:prompt: "it\'s {text}" \n# \U0001f600 = "x"'


@pytest.mark.parametrize(
    "text", ["plain", SETTINGS, "tab\there", "\x7f\x01", "back\\slash", 'ends with "']
)
def test_run_settings_survive_toml(text: str) -> None:
    assert tomllib.loads(to_toml({"key": text}))["key"] == text


def test_a_directory_with_a_run_in_it_is_refused_to_others(tmp_path: Path) -> None:
    from heterotune_flwr.federation.resume import FOLLOWER, check_free, run_lock

    config = compose("quick", [f"run.dir={tmp_path}"])
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with run_lock(tmp_path, FOLLOWER):
        for resuming in (False, True):
            with pytest.raises(ConfigError, match="a run is still writing"):
                launch(config, lambda event: None, resuming)
        (tmp_path / "results.json").write_text("{}")  # a strategy has ended, another goes on
        for check in (check_free, check_directory):
            with pytest.raises(ConfigError, match="a run is still writing"):
                check(tmp_path)
    check_free(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="heterotune run --resume"):
        launch(config, lambda event: None)
    assert (tmp_path / "rounds.jsonl").read_text() == "{}\n"


def test_results_of_an_earlier_run_are_never_overwritten(tmp_path: Path) -> None:
    config = compose("quick", [f"run.dir={tmp_path}"])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds the results of a run already"):
        launch(config, lambda event: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/proc cannot be written"):
        new_config("quick", [], Path("/proc/runs/mine"))  # closed to every user
    new_config("quick", [], tmp_path / "new" / "mine")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepared(tmp_path / "file" / "run").__enter__()
    with pytest.raises(ConfigError, match="absolute"):
        prepared(Path("relative")).__enter__()


def test_traces_of_an_early_failure_do_not_confuse_the_next_run(tmp_path: Path) -> None:
    for name in ("status.json", "rounds.jsonl", "flower.log"):
        (tmp_path / name).write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    with prepared(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.txt", FOLLOWER}


def test_events_are_read_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    reader = EventReader(path)
    assert reader.new() == []
    path.write_text('{"event": "a"}\n{"event": "b')
    assert [e["event"] for e in reader.new()] == ["a"]
    with path.open("a") as stream:
        stream.write('"}\n\n{"event": "c"}\n')
    assert [e["event"] for e in reader.new()] == ["b", "c"]
    assert reader.new() == []


def test_resources_follow_cores_clients_and_the_user() -> None:
    cores = len(os.sched_getaffinity(0))
    config = compose("demo")
    assert plan_resources(config, 1).workers == 1
    assert plan_resources(config, 1000).workers == cores
    config.run.worker_threads = cores
    assert plan_resources(config, 1000).workers == 1
    config.run.workers = 3
    assert plan_resources(config, 1000).workers == 3
    text = Resources(2, 1, 0.25).federation_config(12)
    assert text.split() == [
        "num-supernodes=12", "client-resources-num-cpus=1", "init-args-num-cpus=2",
        "client-resources-num-gpus=0.25",
    ]  # fmt: skip


def test_the_staged_app_builds_and_carries_all_code_and_no_weights(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    app = stage_app(tmp_path / "app")
    names = {path.relative_to(app).as_posix() for path in app.rglob("*") if path.is_file()}
    assert {
        "server_app/app.py",
        "client_app/app.py",
        "conf/demo.yaml",
        "heterotune_flwr/cli.py",
    } <= names
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".toml"}
    assert 0 < len(build_fab_from_disk(app)) < 4_000_000


def test_the_tail_leaves_empty_lines_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert tail(path) == ""
    path.write_text("a\n\n" + "".join(f"{n}\n\n" for n in range(40)))
    assert tail(path, 3) == "37\n38\n39"


def test_the_checkout_itself_is_an_app_flower_accepts(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    root = Path(__file__).resolve().parents[2]
    config, warnings = load_and_validate(root / "pyproject.toml")
    assert warnings == []
    assert set(config["tool"]["flwr"]["app"]["config"]) == {
        "config",
        "overrides",
        "resume",
        "debug",
        "asked",
    }
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name in ("heterotune_flwr", "server_app", "client_app", "conf"):
        shutil.copytree(root / name, tmp_path / name)
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as bundle:
        names = set(bundle.namelist())
    staged = stage_app(tmp_path / "staged")
    same = {p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file()}
    assert same - names == set()  # a checkout and an installed wheel ship the same app
    assert not [name for name in names if name.endswith(("tokenizer.json", ".safetensors"))]


def test_flowers_programs_are_found_beside_python_or_on_the_path(tmp_path, monkeypatch):
    """``pip install --target`` and ``--user`` put them elsewhere than where Python is."""
    assert Path(program("flwr")) == Path(sys.executable).parent / "flwr"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FederationError, match=r"flwr .*elsewhere .*PATH"):
        program("flwr")
    (tmp_path / "flwr").touch(mode=0o755)
    assert program("flwr") == str(tmp_path / "flwr")
