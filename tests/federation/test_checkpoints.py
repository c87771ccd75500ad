"""Checkpoints and journals that are damaged, foreign or of other settings are told, not believed."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, Killed, banks, comparable, killer, run_all

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.storage import save_tensors
from heterotune_flwr.exchange.trees import load_state, read_header, save_state
from heterotune_flwr.federation import checkpoint
from heterotune_flwr.federation.checkpoint import CheckpointError, Checkpoints
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.resume import check_rounds, check_same, run_lock


def saved(tmp_path, rounds=(1, 2, 3), keep=3):
    checkpoints = Checkpoints(tmp_path, keep)
    for number in rounds:
        checkpoints.save("mine", 0, number, {"x": np.full(3, number), "n": number})
    return checkpoints


def test_the_last_ones_are_kept_and_the_newest_is_taken(tmp_path):
    checkpoints = saved(tmp_path, range(1, 6), keep=0)
    names = sorted(p.name for p in (tmp_path / "checkpoints" / "mine-seed0").iterdir())
    assert names == ["round-000004.safetensors", "round-000005.safetensors"]
    found, problems = checkpoints.latest("mine", 0)
    assert (found.round, found.state["n"], problems) == (5, 5, [])
    assert checkpoints.latest("other", 0) == (None, [])


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    checkpoints = saved(tmp_path)
    path = tmp_path / "checkpoints" / "mine-seed0" / "round-000003.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    path.write_bytes({"truncate": bytes(data[:-9]), "flip": bytes(data), "empty": b""}[damage])
    found, (reason,) = checkpoints.latest("mine", 0)
    assert found.round == 2
    assert path.name in reason
    for other in path.parent.iterdir():
        other.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="mine, seed 0"):
        checkpoints.latest("mine", 0)


def test_older_newer_and_foreign_files_are_refused(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path)
    folder = tmp_path / "checkpoints" / "mine-seed0"
    for version in (1, 99):
        monkeypatch.setattr(checkpoint, "VERSION", version)
        checkpoints.save("mine", 0, 4, {"n": 4})
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=f"version {version}"):
            checkpoints.latest("mine", 0)
    save_tensors(folder / "round-000004.safetensors", {"x": np.ones(2)})
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        checkpoints.latest("mine", 0)
    (folder / "round-000004.safetensors").unlink()
    Checkpoints(tmp_path).save("theirs", 0, 9, {"n": 9})
    (tmp_path / "checkpoints" / "theirs-seed0" / "round-000009.safetensors").rename(
        folder / "round-000009.safetensors"
    )
    with pytest.raises(CheckpointError, match="belongs to theirs, seed 0"):
        checkpoints.latest("mine", 0)


def test_a_full_disk_is_one_clear_line_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": KINDS["heterotune"]}, rounds=4)
    directory = Path(config.run.dir)
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        name = os.readlink(f"/proc/self/fd/{handle}")
        calls += "round-000003" in name
        if "round-000003" in name:
            raise OSError(28, "No space left on device")
        real(handle)

    federation = ToyFederation(config)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FederationError, match=r"No space left on device.*--resume"):
            run_all(config, federation)
    assert calls == 1
    files = sorted(p.name for p in (directory / "checkpoints" / "heterotune-seed0").iterdir())
    assert files == ["round-000001.safetensors", "round-000002.safetensors"]
    run_all(config, federation, resuming=True)
    other = toy_config(tmp_path, (1, 1, 1), {"heterotune": KINDS["heterotune"]}, rounds=4)
    run_all(other, ToyFederation(other), directory=tmp_path / "whole")
    assert banks(directory) == banks(tmp_path / "whole")


def test_a_torn_journal_line_is_closed_and_passed_over(tmp_path):
    journal = Journal(tmp_path)
    journal.event("round", round=1)
    with journal.path.open("ab") as stream:
        stream.write(b'{"event": "round", "rou')
    Journal(tmp_path).event("round", round=2)
    found = read_events(journal.path)
    assert [e["event"] for e in found] == ["journal", "round", "journal", "round"]
    assert [e["torn_line"] for e in found if e["event"] == "journal"] == [False, True]


def interrupted(tmp_path, at=20):
    """A run that was killed, its federation and configuration."""
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": KINDS["heterotune"]}, rounds=4)
    federation = ToyFederation(config)
    with pytest.raises(Killed):
        run_all(config, federation, drop=killer(at))
    return config, federation


def test_changed_settings_clients_and_maps_are_refused(tmp_path):
    config, federation = interrupted(tmp_path)
    directory = Path(config.run.dir)
    config.method.inner = 5
    with pytest.raises(CheckpointError, match="other settings"):
        run_all(config, federation, resuming=True)
    config.method.inner = 6
    config.server.rounds = 1
    with pytest.raises(ConfigError, match="rounds already"):
        check_rounds(directory, config)
    config.server.rounds = 4
    check_rounds(directory, config)
    (folder,) = (directory / "checkpoints").iterdir()
    newest = sorted(folder.iterdir())[-1]
    state = load_state(newest)
    good = newest.read_bytes()
    state["shared"]["global"]["slots.0.gate.bias"] = np.zeros(7, np.float32)
    save_state(newest, state, read_header(newest))
    with pytest.raises(CheckpointError, match=r"slots\.0\.gate\.bias of global"):
        run_all(config, federation, resuming=True)
    newest.write_bytes(good)
    for path in (directory / "maps").iterdir():
        state = load_state(path)
        next(iter(state["tensors"]["small@fp32"].values())).flat[0] += 1
        save_state(path, state)
    with pytest.raises(CheckpointError, match="maps of small@fp32 are not those"):
        run_all(config, federation, resuming=True)


def test_damaged_results_are_made_anew_and_those_of_others_stay(tmp_path):
    specs = {name: KINDS[name] for name in ("heterotune", "local_only")}
    config = toy_config(tmp_path, (1, 1, 1), specs, rounds=2)
    federation = ToyFederation(config)
    whole = comparable(run_all(config, federation))
    path = Path(config.run.dir) / "results.json"
    path.write_text(path.read_text()[:500])
    assert comparable(run_all(config, federation, resuming=True)) == whole
    assert [
        e for e in read_events(path.parent / "rounds.jsonl") if e["event"] == "results_unreadable"
    ]
    config.run.compare, config.run.seeds = ["local_only"], [1]
    results = run_all(config, federation, resuming=True)
    assert [(r["strategy"], r["seed"]) for r in results["runs"]] == [
        *((r["strategy"], r["seed"]) for r in whole), ("local_only", 1),
    ]  # fmt: skip


def test_what_may_change_and_what_not(tmp_path):
    config, other = toy_config(tmp_path), toy_config(tmp_path)
    other.server.rounds, other.run.workers = 99, 1
    check_same(config, other, tmp_path)
    other.train.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"train\.learning_rate=.* 0\.5"):
        check_same(config, other, tmp_path)


def test_a_rate_said_for_all_is_named_and_not_what_it_leaves_out(tmp_path):
    config, other = toy_config(tmp_path), toy_config(tmp_path)
    config.strategies = {"a": {"train": {"learning_rate": 0.1}}}
    other.strategies = {"a": {}}
    other.train.learning_rate = 0.5
    with pytest.raises(ConfigError, match=r"started with train\.learning_rate="):
        check_same(config, other, tmp_path)


def test_checkpoints_of_another_format_are_refused_before_a_run_goes_on(tmp_path, monkeypatch):
    config = toy_config(tmp_path)
    config.run.compare, config.run.seeds = ["mine"], [0]
    config.server.rounds = 3
    saved(tmp_path)
    check_rounds(tmp_path, config)
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    with pytest.raises(CheckpointError, match="format version"):
        check_rounds(tmp_path, config)


def test_two_servers_cannot_write_to_one_directory(tmp_path):
    with run_lock(tmp_path), pytest.raises(ConfigError, match="still writing"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_the_saved_configuration_is_flat_and_whole(tmp_path):
    from heterotune_flwr.federation.resume import flatten

    config = toy_config(tmp_path)
    keys = dict(flatten(asdict(config)))
    assert keys["server.rounds"] == config.server.rounds
    assert isinstance(keys["types"], list)
