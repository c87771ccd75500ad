"""Checkpoints: a run that died anywhere goes on to the very same end, and damaged files are told, not believed."""

from __future__ import annotations

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, Killed, banks, comparable, killer, run_all

from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.flower import Error, Message


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
    specs = {name: KINDS[name] for name in ("own_gates", "fedit")}
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
    config = toy_config(tmp_path, (2, 1, 1), {"own_gates": KINDS["own_gates"]}, rounds=3)
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
    config = toy_config(tmp_path, (2, 1, 1), {"own_gates": KINDS["own_gates"]}, rounds=3)
    run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    federation = ToyFederation(config)
    nodes = [context.node_config for context in federation.grid().contexts.values()]
    dies = {(i, "train", "2"): 2 for i in range(4)}
    with pytest.raises(FederationError, match="all 4 clients died"):
        run_strategies(
            DyingGrid(federation.app(), nodes, dies=dies, code=0),
            config,
            Journal(tmp_path / "one"),
            "toy-0",
        )
    run_all(config, federation, resuming=True, directory=tmp_path / "one")
    assert banks(tmp_path / "one") == banks(tmp_path / "whole")
