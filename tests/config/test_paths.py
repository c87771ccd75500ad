"""Paths of a configuration are taken from where the user stands: workers stand elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.experiment import with_absolute_paths


def test_paths_become_absolute_and_names_stay_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "tiny-a").mkdir()  # a folder does not hide the embedded backbone of that name
    (tmp_path / "anchors.txt").write_text("x\n")
    given = compose(
        "demo",
        "types.1.backbone=model types.2.backbone=owner/name alignment.anchors=anchors.txt "
        "data.train=train.csv data.test=~/test.csv run.dir=out run.state_dir=state",
    )
    config = with_absolute_paths(given)
    assert [t.backbone for t in config.types] == ["tiny-a", str(tmp_path / "model"), "owner/name"]
    assert config.alignment.anchors == str(tmp_path / "anchors.txt")
    assert config.data.train == str(tmp_path / "train.csv")
    assert config.data.test == str(Path.home() / "test.csv")
    assert (config.run.dir, config.run.state_dir) == (
        str(tmp_path / "out"),
        str(tmp_path / "state"),
    )
    assert given.run.dir == "out"


def test_paths_in_a_file_are_looked_for_beside_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, project / "tiny-a", project / "model.v1", elsewhere):
        folder.mkdir()
    for name in ("train.csv", "saved", "anchors.txt"):
        (project / name).touch()
        (elsewhere / name).touch()
    (elsewhere / "test.csv").touch()
    (project / "run.yaml").write_text(
        "types: [{backbone: tiny-a}, {backbone: ./tiny-a}, {backbone: model.v1}, {backbone: owner/name}]\n"
        "data: {train: saved, test: test.csv}\nalignment: {anchors: anchors.txt}\n"
    )
    monkeypatch.chdir(elsewhere)
    found = with_absolute_paths(compose(str(project / "run.yaml")))
    assert [entry.backbone for entry in found.types] == [
        "tiny-a", str(project / "tiny-a"), str(project / "model.v1"), "owner/name",
    ]  # fmt: skip
    assert found.alignment.anchors == str(project / "anchors.txt")
    assert found.data.train == str(project / "saved")
    assert found.data.test == str(elsewhere / "test.csv")  # only there
    # What the command line says is meant from where it is said.
    said = compose("../project/run.yaml", "data.train=train.csv")
    assert with_absolute_paths(said).data.train == str(elsewhere / "train.csv")


@pytest.mark.parametrize("content", ["data: [1]", "types: {a: 1}", "types: [1]"])
def test_what_is_no_path_is_refused_as_ever(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"data|types"):
        compose(str(tmp_path / "run.yaml"))


def test_shipped_anchors_and_missing_settings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debian-other").mkdir()
    config = compose("demo")
    assert with_absolute_paths(config) == config


def test_worker_count_is_checked() -> None:
    assert compose("demo", "run.workers=2").run.workers == 2
    assert compose("demo").run.workers is None
    with pytest.raises(ConfigError, match=r"run\.workers is 0"):
        compose("demo", "run.workers=0")
