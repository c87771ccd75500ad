"""Checkpoints: a run that died anywhere goes on to the very same end, and damaged files are told, not believed."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, Killed, banks, comparable, killer, run_all

from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.exchange.storage import save_tensors
from heterotune_flwr.exchange.trees import load_state, read_header, save_state
from heterotune_flwr.federation import checkpoint
from heterotune_flwr.federation.checkpoint import CheckpointError, Checkpoints
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.resume import check_rounds, check_same, run_lock
from heterotune_flwr.flower import Error, Message
from heterotune_flwr.run import run_strategies


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_run_killed_anywhere_ends_with_the_same_bank(tmp_path, name):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    config = toy_config(tmp_path / "whole", (2, 1, 1), {name: KINDS[name]}, rounds=3)
    config.train.local_steps = 3
    whole = run_all(config, ToyFederation(config))
    federation = ToyFederation(config)
    counted = ToyFederation(config)
    messages = run_all(config, counted, directory=tmp_path / "counted") and len(counted.log) + 4
    for at in range(5, messages, 4):
        directory = tmp_path / "killed" / str(at)
        federation = ToyFederation(config)
        with pytest.raises(Killed):
            run_all(config, federation, drop=killer(at), directory=directory)
        results = run_all(config, federation, resuming=True, directory=directory)
        assert banks(directory) == banks(config.run.dir), at
        assert comparable(results) == comparable(whole), at


def test_killed_twice_between_strategies_and_within_one(tmp_path):
    specs = {name: KINDS[name] for name in ("private", "fedit")}
    config = toy_config(tmp_path, (1, 1, 1), specs, rounds=4, evaluate_every=2)
    config.run.seeds = [0, 1]
    whole = run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    federation, directory = ToyFederation(config), tmp_path / "killed"
    for at in (12, 20, 60):
        with pytest.raises(Killed):
            run_all(config, federation, at != 12, killer(at), directory)
    results = run_all(config, federation, True, directory=directory)
    assert banks(directory) == banks(tmp_path / "whole")
    assert comparable(results) == comparable(whole)
    assert [
        e["strategy"]
        for e in read_events(directory / "rounds.jsonl")
        if e["event"] == "already_finished"
    ]


def test_a_finished_run_is_extended(tmp_path):
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": KINDS["heterotune"]}, rounds=5)
    whole = run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    federation = ToyFederation(config)
    config.server.rounds = 3
    run_all(config, federation, directory=tmp_path / "two")
    config.server.rounds = 5
    results = run_all(config, federation, resuming=True, directory=tmp_path / "two")
    assert banks(tmp_path / "two") == banks(tmp_path / "whole")
    assert results["runs"][0]["overall"] == whole["runs"][0]["overall"]


def test_the_ledger_goes_on(tmp_path):
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": KINDS["heterotune"]}, rounds=4)
    whole = run_all(config, ToyFederation(config), directory=tmp_path / "whole")["runs"][0]["bytes"]
    federation = ToyFederation(config)
    with pytest.raises(Killed):
        run_all(
            config, federation, drop=killer(3 + 3 + 3 + 3 * 2 + 1), directory=tmp_path / "killed"
        )
    again = run_all(config, federation, True, directory=tmp_path / "killed")["runs"][0]["bytes"]
    for key in ("train_up", "train_down", "client_rounds", "evaluate_up", "up_per_client_round"):
        assert again[key] == whole[key], key
    assert again["one_time_up"] > whole["one_time_up"]  # it was asked twice who is there


class DyingGrid(InProcessGrid):
    """Answers as Flower does where the process that worked on a message is killed: after the work, before the reply."""

    def __init__(self, *arguments, dies, code, **options):
        super().__init__(*arguments, **options)
        self.dies, self.code = dies, code

    def answer(self, message, context):
        reply = super().answer(message, context)
        where = (
            context.node_config["partition-id"],
            message.metadata.message_type,
            message.metadata.group_id,
        )
        if self.dies.get(where, 0) == 0:
            return reply
        self.dies[where] -= 1
        request = Message(
            message.content, message.metadata.dst_node_id, message.metadata.message_type
        )
        request.metadata.__dict__["_message_id"] = message.metadata.message_id
        return Message(Error(self.code, "ActorDiedError"), reply_to=request)


@pytest.mark.parametrize("code", [0, 8])
def test_a_message_whose_process_died_is_given_to_the_next_one_and_changes_nothing(tmp_path, code):
    config = toy_config(tmp_path, (2, 1, 1), {"private": KINDS["private"]}, rounds=3)
    run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    plain = ToyFederation(config).grid()
    nodes = [context.node_config for context in plain.contexts.values()]
    dies = {(1, "train", "2"): 1, (2, "evaluate", "3"): 1, (3, "train", "3"): 2}

    def killed(directory, dies):
        grid = DyingGrid(ToyFederation(config).app(), nodes, dies=dict(dies), code=code)
        run_strategies(grid, config, Journal(directory), "toy-0")
        return read_events(directory / "rounds.jsonl")

    events = killed(tmp_path / "once", dict.fromkeys(dies, 1))
    assert banks(tmp_path / "once") == banks(tmp_path / "whole")
    again = [
        (e["client_id"], e["message_type"], e["round"])
        for e in events
        if e["event"] == "sent_again"
    ]
    assert again == [
        ("client-0001", "train", 2),
        ("client-0003", "train", 3),
        ("client-0002", "evaluate", 3),
    ]
    assert not [e for e in events if e["event"] == "client_failed"]
    events = killed(tmp_path / "twice", dies)
    (failed,) = [
        e for e in events if e["event"] == "client_failed"
    ]  # it dies of this message: costs only itself
    assert (failed["client_id"], failed["round"]) == ("client-0003", 3)
    assert [e["clients"] for e in events if e["event"] == "round"] == [4, 4, 3]


def test_when_all_processes_die_the_run_ends_and_goes_on_where_it_was(tmp_path):
    config = toy_config(tmp_path, (2, 1, 1), {"private": KINDS["private"]}, rounds=3)
    run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    federation = ToyFederation(config)
    nodes = [context.node_config for context in federation.grid().contexts.values()]
    dies = {(i, "train", "2"): 2 for i in range(4)}
    with pytest.raises(
        FederationError, match="processes of all 4 clients died, twice: error 0: ActorDied"
    ):
        run_strategies(
            DyingGrid(federation.app(), nodes, dies=dies, code=0),
            config,
            Journal(tmp_path / "one"),
            "toy-0",
        )
    run_all(config, federation, resuming=True, directory=tmp_path / "one")
    assert banks(tmp_path / "one") == banks(tmp_path / "whole")


# ----------------------------------------------------------------------------- damaged and foreign


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
    with pytest.raises(CheckpointError, match="no checkpoint of mine, seed 0, can be read"):
        checkpoints.latest("mine", 0)


def test_older_newer_and_foreign_files_are_refused(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path)
    folder = tmp_path / "checkpoints" / "mine-seed0"
    for version in (1, 99):
        monkeypatch.setattr(checkpoint, "VERSION", version)
        checkpoints.save("mine", 0, 4, {"n": 4})
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=f"version {version}, this program reads 3;"):
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
        with pytest.raises(FederationError, match=r"No space left on device; make room.*--resume"):
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
    with pytest.raises(
        CheckpointError, match=r"written with other settings than config\.yaml has now"
    ):
        run_all(config, federation, resuming=True)
    config.method.inner = 6
    config.server.rounds = 1
    with pytest.raises(ConfigError, match=r"has done \d rounds already, more than server"):
        check_rounds(directory, config)
    config.server.rounds = 4
    check_rounds(directory, config)
    (folder,) = (directory / "checkpoints").iterdir()
    newest = sorted(folder.iterdir())[-1]
    state = load_state(newest)
    good = newest.read_bytes()
    state["shared"]["global"]["slots.0.gate.bias"] = np.zeros(7, np.float32)
    save_state(newest, state, read_header(newest))
    with pytest.raises(
        CheckpointError, match=r"does not fit: slots\.0\.gate\.bias of global is \[7\] there"
    ):
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
    with pytest.raises(ConfigError, match=r"started with train.learning_rate=.*, not 0.5"):
        check_same(config, other, tmp_path)


def test_two_servers_cannot_write_to_one_directory(tmp_path):
    with run_lock(tmp_path), pytest.raises(ConfigError, match="still writing"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


# -------------------------------------------------------------------------------------- state trees

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
arrays = st.integers(0, 4).map(lambda n: np.arange(n, dtype=np.float64) / 3)
trees = st.recursive(
    leaves | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return type(one) is type(other) and one == other


@given(state=st.dictionaries(st.text(), trees, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_state_comes_back_as_it_was(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state(path, {"all": state, "names": {"b", "a"}}, {"round": "3"})
    back = load_state(path)
    assert same(back["all"], state)
    assert back["names"] == {"a", "b"}
    assert read_header(path)["round"] == "3"


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ExchangeError, match="/inner/thing is a object, which cannot be saved"):
        save_state(tmp_path / "s", {"inner": {"thing": object()}})
    with pytest.raises(ExchangeError, match="cannot be read"):
        read_header(tmp_path / "nothing")


def test_the_saved_configuration_is_flat_and_whole(tmp_path):
    from heterotune_flwr.federation.resume import flatten

    config = toy_config(tmp_path)
    keys = dict(flatten(asdict(config)))
    assert keys["server.rounds"] == config.server.rounds
    assert isinstance(keys["types"], list)
