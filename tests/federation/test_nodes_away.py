"""Nodes that are away, or whose process dies: a run asks them again where it needs them, before and in its rounds."""

from __future__ import annotations

import re
import time
from typing import ClassVar

import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import collection, factors_asked, roster
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.flower import Error, Message
from heterotune_flwr.protocol.wire import error_content

AWAY, DIED, RAISED = 5, 8, 2


class Flickering(InProcessGrid):
    """Answers the first ``times`` messages of a kind to some nodes (by place in the list) with an error of Flower's."""

    def trouble(self, kind, code, times, places=(0,)):
        ids = list(self.contexts)
        self.left = {ids[place]: times for place in places}
        self.kind, self.code, self.asked = kind, code, []

    def answer(self, message, context):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == self.kind:
            self.asked.append(node)
            if self.left.get(node, 0) > 0:
                self.left[node] -= 1
                error = Error(self.code, "Node Unavailable")
                return Message(error, reply_to=message)
        return super().answer(message, context)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    for module in (roster, factors_asked, collection):
        monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)


def federation(tmp_path, kind, code, times, places=(0,), clients=(2, 1, 0), **server):
    config = toy_config(
        tmp_path,
        clients,
        {"heterotune": {"_component_": "heterotune_flwr.strategies.heterotune.HeteroTune"}},
        **server,
    )
    toy = ToyFederation(config)
    count = sum(clients)
    nodes = [{"partition-id": i, "num-partitions": count} for i in range(count)]
    grid = Flickering(toy.app(), nodes)
    grid.trouble(kind, code, times, places)
    return grid, config, Journal(tmp_path / "run")


@pytest.mark.parametrize("code", [AWAY, DIED])
def test_a_node_that_was_away_or_died_is_asked_again_who_it_is(tmp_path, code):
    grid, config, journal = federation(tmp_path, "query.describe", code, times=2)
    run_strategies(grid, config, journal, "toy-0")
    (told,) = [e for e in read_events(journal.path) if e["event"] == "describe"]
    assert told["clients"] == 3
    # The other two have answered and are left in peace.
    assert len(grid.asked) == 3 + 2


def test_nobody_waits_for_a_node_that_is_away_when_there_are_enough(tmp_path):
    grid, config, journal = federation(
        tmp_path, "query.describe", AWAY, times=99, min_clients=2, wait_seconds=600.0
    )
    began = time.monotonic()
    run_strategies(grid, config, journal, "toy-0")
    assert time.monotonic() - began < 60
    assert len(grid.asked) == 3


class Namesakes(ToyFederation):
    """``names``: client id -> what it calls itself; ``mute``: client ids that answer with an error."""

    names: ClassVar[dict[str, str]] = {}
    mute: ClassVar[set[str]] = set()

    def who(self, context):
        client_id, *rest = super().who(context)
        return self.names.get(client_id, client_id), *rest

    def describe(self, message, context):
        client_id = self.who(context)[0]
        if client_id in self.mute:
            return Message(
                error_content("its data\x1b is gone", client_id=client_id), reply_to=message
            )
        return super().describe(message, context)


def namesakes(tmp_path, reverse=False, minimum=2, **faults):
    spec = {"_component_": "heterotune_flwr.strategies.heterotune.HeteroTune"}
    config = toy_config(tmp_path, (2, 1, 0), {"heterotune": spec}, min_clients=minimum)
    toy = type("Toy", (Namesakes,), faults)(config)
    journal = Journal(tmp_path / "run")
    try:
        run_strategies(toy.grid(reverse=reverse), config, journal, "toy-0")
    finally:
        events = read_events(journal.path)
    left = [e for e in events if e["event"] == "left_out"]
    return left, next(e for e in events if e["event"] == "describe")


def test_a_node_that_answers_with_an_error_is_on_record(tmp_path):
    left, told = namesakes(tmp_path, mute={"client-0002"})
    assert [(e["client_id"], e["reason"]) for e in left] == [("client-0002", "its data? is gone")]
    assert sorted(told["members"]) == ["client-0000", "client-0001"]
    with pytest.raises(FederationError, match=r"client-0002.*its data"):
        namesakes(tmp_path, minimum=3, mute={"client-0002"})


@pytest.mark.parametrize("reverse", [False, True])
def test_a_second_node_of_one_name_does_not_stop_the_others(tmp_path, reverse):
    left, told = namesakes(tmp_path, reverse, names={"client-0002": "client-0000"})
    assert sorted(told["members"]) == ["client-0000", "client-0001"]
    (one,) = left
    assert one["client_id"] == "client-0000"
    nodes = [int(n) for n in re.findall(r"\d{2,}", one["reason"].replace("client-0000", ""))]
    assert int(one["node_id"]) == max(nodes)
    assert f"{min(nodes)} takes part" in one["reason"]


def test_patience_with_those_that_are_away_ends(tmp_path):
    grid, config, journal = federation(tmp_path, "query.describe", AWAY, times=999)
    with pytest.raises(FederationError, match=r"only 2 of 3 clients .* node \d+: error 5"):
        run_strategies(grid, config, journal, "toy-0")
    assert len(grid.asked) > 5


def test_a_client_that_refuses_is_not_asked_again(tmp_path):
    grid, config, journal = federation(
        tmp_path, "query.describe", RAISED, times=1, wait_seconds=600.0
    )
    with pytest.raises(FederationError, match="only 2 of 3"):
        run_strategies(grid, config, journal, "toy-0")
    assert len(grid.asked) == 3


@pytest.mark.parametrize(("places", "asked"), [((0,), 3), ((1,), 4), ((0, 2), 5)])
def test_alignment_goes_to_the_next_client_of_a_type_and_then_back(tmp_path, places, asked):
    """Of the two types, the clients 0 and 2 are one and client 1 the other."""
    grid, config, journal = federation(tmp_path, "query.align", AWAY, times=2, places=places)
    run_strategies(grid, config, journal, "toy-0")
    events = [e["event"] for e in read_events(journal.path)]
    assert events.count("align") == 1
    assert events.count("round") == config.server.rounds
    assert len(grid.asked) >= asked


def test_alignment_gives_up_when_a_type_stays_away(tmp_path):
    grid, config, journal = federation(tmp_path, "query.align", AWAY, times=999, places=(1,))
    with pytest.raises(FederationError, match="could be aligned; client-0001: error 5"):
        run_strategies(grid, config, journal, "toy-0")
    assert len(grid.asked) > 4


def test_what_precedes_the_first_round_has_a_patience_of_its_own(tmp_path):
    grid, config, journal = federation(
        tmp_path, "none", AWAY, 0, timeout_seconds=600.0, query_seconds=0.2
    )
    silent = next(iter(grid.contexts))
    grid.drop = lambda node, kind, round: node == silent and kind == "query.describe"
    began = time.monotonic()
    with pytest.raises(FederationError, match="no reply within 0 s"):
        run_strategies(grid, config, journal, "toy-0")
    assert time.monotonic() - began < 30


def train_events(journal, name):
    return [e for e in read_events(journal.path) if e["event"] == name]


def test_a_round_waits_for_nodes_without_which_it_would_be_skipped(tmp_path):
    grid, config, journal = federation(
        tmp_path, "train", AWAY, times=4, places=(0, 1, 2), wait_seconds=60.0
    )
    run_strategies(grid, config, journal, "toy-0")
    assert train_events(journal, "skipped") == train_events(journal, "client_failed") == []
    rounds = train_events(journal, "round")
    assert [e["clients"] for e in rounds] == [3] * config.server.rounds
    again = train_events(journal, "sent_again")
    assert [e["round"] for e in again] == [1] * 12
    assert {e["message_type"] for e in again} == {"train"}


def test_a_round_with_enough_updates_does_not_wait(tmp_path):
    grid, config, journal = federation(
        tmp_path, "train", AWAY, times=99, places=(0,), wait_seconds=600.0, cooldown_after=0
    )
    began = time.monotonic()
    run_strategies(grid, config, journal, "toy-0")
    assert time.monotonic() - began < 60
    assert [e["clients"] for e in train_events(journal, "round")] == [2] * config.server.rounds
    assert train_events(journal, "sent_again") == []
    assert len(train_events(journal, "client_failed")) == config.server.rounds


def test_the_patience_of_a_round_ends(tmp_path):
    grid, config, journal = federation(
        tmp_path, "train", AWAY, times=9999, places=(0, 1, 2), wait_seconds=0.5
    )
    with pytest.raises(FederationError, match=r"no usable update in 3 rounds; .* error 5"):
        run_strategies(grid, config, journal, "toy-0")
    assert len(train_events(journal, "skipped")) == 3
    assert len(train_events(journal, "client_failed")) == 9
    assert len(train_events(journal, "sent_again")) > 9


@pytest.mark.parametrize(("give_up_after", "rounds"), [(2, 2), (0, 5)])
def test_how_many_empty_rounds_end_a_run_is_an_option(tmp_path, give_up_after, rounds):
    grid, config, journal = federation(
        tmp_path, "none", AWAY, 0, rounds=5, give_up_after=give_up_after, cooldown_after=0,
        timeout_seconds=0.1, query_seconds=5.0,
    )  # fmt: skip
    grid.drop = lambda node, kind, round: kind == "train"
    if give_up_after:
        with pytest.raises(FederationError, match=f"in {give_up_after} rounds"):
            run_strategies(grid, config, journal, "toy-0")
    else:
        run_strategies(grid, config, journal, "toy-0")
    skipped = [e for e in read_events(journal.path) if e["event"] == "skipped"]
    assert len(skipped) == rounds


def test_impossible_patience_is_refused():
    for override in ("server.give_up_after=-1", "server.query_seconds=0"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            compose("demo", override)
