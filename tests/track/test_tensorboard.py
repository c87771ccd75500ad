"""TensorBoard, read back with its own reader: beside a run, afterwards, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, Killed, killer
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.config.compose import to_yaml
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.track.trackers import check_trackers
from heterotune_flwr.track.tracking import LiveTracking, track_afterwards


def tracked(config, federation, resuming=False, drop=None):
    journal = Journal(Path(config.run.dir))
    journal.config(to_yaml(config))
    with LiveTracking(config, journal):
        run_strategies(federation.grid(drop=drop), config, journal, "toy-0", resuming)


def read(directory):
    """Track -> name -> (step, value)s."""
    found = {}
    for folder in sorted((directory / "track/tensorboard").iterdir()):
        reader = EventAccumulator(str(folder), purge_orphaned_data=False).Reload()
        found[folder.name] = {
            tag: [(one.step, one.value) for one in reader.Scalars(tag)]
            for tag in reader.Tags()["scalars"]
        }
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was killed in its second strategy and resumed, tracked all the while."""
    tmp_path = tmp_path_factory.mktemp("tracked")
    spec = {"local_only": KINDS["local_only"], "heterotune": KINDS["heterotune"]}
    config = toy_config(tmp_path, (1, 1, 1), spec, rounds=3, evaluate_every=2)
    config.run.track = ["tensorboard"]
    federation = ToyFederation(config)
    with pytest.raises(Killed):
        tracked(config, federation, drop=killer(36))
    tracked(config, federation, resuming=True)
    return tmp_path / "run"


def test_what_was_written_beside_the_run_is_what_its_journal_says(run):
    found = read(run)
    assert sorted(found) == ["heterotune-seed0", "local_only-seed0"]
    for name, scalars in found.items():
        assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3], name
        assert [step for step, _ in scalars["test/global_accuracy_mean"]] == [0, 2, 3], name
    last = {
        (event["strategy"], event["round"]): event["loss"]
        for event in read_events(run / "rounds.jsonl")
        if event["event"] == "round"
    }
    for (strategy, step), loss in last.items():
        assert dict(found[f"{strategy}-seed0"]["train/loss"])[step] == pytest.approx(loss)


def test_afterwards_the_same_is_written_anew(run):
    live = read(run)
    done = CliRunner().invoke(app, ["track", str(run), "--to", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert f"tensorboard --logdir {run / 'track/tensorboard'}" in done.output
    assert read(run) == live


def test_a_run_of_an_older_program_is_written_without_its_settings(run, tmp_path):
    older = shutil.copytree(run, tmp_path / "older")
    (older / "config.yaml").write_text("alignment: {a_key_of_long_ago: 3}\n")
    (tracker,) = track_afterwards(older, ["tensorboard"])
    assert tracker.written
    assert read(older).keys() == read(run).keys()


def test_a_tracker_that_is_unknown_or_missing_is_told_before_any_work(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"run\.track.*tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'heterotune-flwr\[mlflow\]'"):
        check_trackers(["mlflow"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no run directory"):
        track_afterwards(tmp_path, ["tensorboard"])


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, monkeypatch):
    from heterotune_flwr.track import tensorboard

    def broken(*_):
        raise OSError("http://me:SECRET@host refuses")

    monkeypatch.setattr(tensorboard, "open_sink", broken)
    config = toy_config(tmp_path, (1, 1), {"heterotune": KINDS["heterotune"]}, rounds=1)
    config.run.track = ["tensorboard"]
    federation = ToyFederation(config)
    tracked(config, federation)
    events = read_events(tmp_path / "run" / "rounds.jsonl")
    (failed,) = [event for event in events if event["event"] == "track_failed"]
    assert (failed["tracker"], failed["reason"]) == ("tensorboard", "OSError")
    assert [event for event in events if event["event"] == "strategy_end"]
