"""How many messages are under way at a time, how long they live, and what is told of them."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest
from flwr.server.superlink.linkstate import in_memory_linkstate
from rich.console import Console

from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import journal, simulated
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.messenger import Enough, make_message, send_and_collect
from heterotune_flwr.flower import ClientApp, ConfigRecord, Context, Message, RecordDict
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.status import Standing, follow
from heterotune_flwr.schema import (
    Config,
)


def _echo():
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


class Counting(InProcessGrid):
    """Answers one message a pull, the oldest first; knows how many were ever under way."""

    def __init__(self, count, most, lost=()):
        super().__init__(_echo(), [{"partition-id": i} for i in range(count)], most_in_flight=most)
        self.under_way, self.peak, self.sent = {}, 0, []
        self.lost = lost

    def push_messages(self, messages):
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message, key in zip(messages, ids, strict=True):
            self.under_way[key] = message.metadata.dst_node_id
            self.sent.append(message)
        self.peak = max(self.peak, len(self.under_way))
        return ids

    def pull_messages(self, message_ids):
        for key in message_ids:
            if self.under_way.get(key) not in self.lost:
                self.under_way.pop(key, None)
                return super().pull_messages([key])
        return []


def _messages(grid, timeout=60.0):
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    return [make_message(content, node, "query", 0, timeout) for node in grid.get_node_ids()]


@pytest.mark.parametrize(("most", "peak"), [(16, 16), (None, 200), (1, 1)])
def test_no_more_messages_are_under_way_than_may_be(most, peak):
    grid = Counting(200, most)
    told = []
    replies = send_and_collect(
        grid, _messages(grid), 60.0, on_progress=lambda done, of: told.append((done, of))
    )
    assert grid.peak == peak
    assert [m.metadata.src_node_id for m in replies.messages] == list(grid.get_node_ids())
    assert told == [(n, 200) for n in range(1, 201)]
    assert not replies.failures


def test_a_deadline_and_a_messages_life_count_from_its_own_sending():
    grid = Counting(6, 2)
    grid.lost = set(grid.get_node_ids())
    messages, begun = _messages(grid, 0.3), time.monotonic()
    made = [message.metadata.created_at for message in messages]
    replies = send_and_collect(grid, messages, 0.3)
    assert replies.late == grid.lost
    assert grid.peak <= 6  # those given up are no longer waited for
    assert 0.85 <= time.monotonic() - begun < 3.0
    assert all(0.3 <= seconds < 0.9 for seconds in replies.seconds.values())
    lives = [m.metadata.created_at - first for m, first in zip(grid.sent, made, strict=True)]
    assert lives[-1] > 0.5 > lives[0]
    assert {m.metadata.ttl for m in grid.sent} == {messages[0].metadata.ttl}


class Forgetful(InProcessGrid):
    """Takes what it is given but for some nodes, whose messages its answer leaves out, as Flower's simulation does."""

    refused: tuple[int, ...] = ()

    def push_messages(self, messages):
        taken = [m for m in messages if m.metadata.dst_node_id not in self.refused]
        return list(super().push_messages(taken))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_messages_that_the_grid_leaves_out_are_told_as_unsent(count: int):
    grid = Forgetful(_echo(), [{"partition-id": i} for i in range(3)])
    nodes = list(grid.get_node_ids())
    grid.refused = tuple(nodes[:count])
    replies = send_and_collect(grid, _messages(grid), 5.0)
    assert [m.metadata.src_node_id for m in replies.messages] == nodes[count:]
    assert replies.failures == dict.fromkeys(nodes[:count], "the message could not be sent")


def test_who_was_not_asked_when_a_round_closes_is_not_awaited():
    grid = Counting(20, 4)
    replies = send_and_collect(grid, _messages(grid), 60.0, lambda reply: True, Enough(first=5))
    nodes = list(grid.get_node_ids())
    assert replies.taken == set(nodes[:5])
    assert replies.unawaited == set(nodes[5:])
    assert len(grid.sent) < 10


def test_only_a_simulation_holds_messages_back(monkeypatch):
    monkeypatch.delitem(sys.modules, "flwr.simulation.run_simulation", raising=False)
    grid = object()
    assert simulated.most_in_flight(grid) is None
    assert not simulated.mend_poll()
    monkeypatch.setitem(sys.modules, "flwr.simulation.run_simulation", object())
    assert simulated.most_in_flight(grid) >= 16


def test_flowers_poll_looks_through_its_messages_for_nodes_that_have_one_alone(monkeypatch):
    """On Flower's own store: the same messages are handed over, each once, without a scan per node."""
    monkeypatch.setitem(sys.modules, "flwr.simulation.run_simulation", object())
    kind = in_memory_linkstate.InMemoryLinkState
    monkeypatch.setattr(kind, "get_message_ins", kind.get_message_ins)  # put back afterwards
    plain, scanned = kind.get_message_ins, []
    monkeypatch.setattr(
        kind, "get_message_ins", lambda *a, **k: scanned.append(k) or plain(*a, **k)
    )
    assert simulated.mend_poll()
    assert simulated.mend_poll()  # once
    state = kind.__new__(kind)
    state.lock, state.message_ins_store = threading.RLock(), {}
    state._check_stored_messages = lambda ids: None
    grid = Counting(100, None)
    for number, message in enumerate(_messages(grid)[:5]):
        message.metadata.delivered_at = ""
        state.message_ins_store[str(number)] = message
    found = []
    for node in grid.get_node_ids():
        found += state.get_message_ins(node_id=node, limit=1)
    assert found == list(state.message_ins_store.values())
    assert len(scanned) == 5
    time.sleep(0.03)
    assert not any(state.get_message_ins(node_id=node, limit=1) for node in grid.get_node_ids())
    assert len(scanned) == 5
    del state.message_ins_store  # a Flower that has changed: its own way
    time.sleep(0.03)
    with pytest.raises(AttributeError):
        state.get_message_ins(node_id=1, limit=1)


def test_maps_go_once_to_the_disk_that_virtual_clients_share(world):
    """The same results and bytes, but for the messages that really went out."""
    results, carried = [], []
    for most in (None, 2):
        grid = InProcessGrid(app, world_nodes(world), world.run_config, most_in_flight=most)
        count = []
        push = grid.push_messages
        grid.push_messages = lambda messages, push=push, count=count: push(
            [count.append("maps" in m.content) or m for m in messages]
        )
        results.append(run_world(world, grid, f"most-{most or 0}"))
        carried.append(sum(count))
    one, other = (r["runs"][0] for r in results)
    assert one["bytes"]["one_time_down"] == other["bytes"]["one_time_down"]
    assert one["clients"] == other["clients"]
    assert carried[0] == 4
    assert carried[1] == 2  # the first of each type


def world_nodes(world):
    return [dict(context.node_config) for context in world.grid.contexts.values()]


def run_world(world, grid, name):
    overrides = (
        f"server.rounds=1 run.dir={world.path / name} method.latent=8 method.inner=4 "
        "alignment.shrinkage=[0.1] alignment.cache=false"
    )
    world.run_config["overrides"] = overrides
    for context in grid.contexts.values():
        context.run_config["overrides"] = overrides
    config = compose(world.run_config["config"], overrides)
    config.strategies = {"one": {"_component_": "heterotune_flwr.strategies.HeteroTune"}}
    config.run.compare = ["one"]
    return run_strategies(grid, config, Journal(world.path / name), name)


def test_what_is_under_way_is_told_now_and_then(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(journal.time, "monotonic", lambda: next(clock))
    told = []

    class Told:
        def event(self, event, /, **fields):
            told.append((event, fields))

    pace = journal.Pace(Told(), "asking")
    for done in range(1, 9):
        pace(done, 8)
    assert [fields["done"] for _, fields in told] == [2, 4, 6]
    assert told[0] == ("progress", {"what": "asking", "done": 2, "clients": 8})
    monkeypatch.undo()
    text = io.StringIO()
    show = RunProgress(Config(), Console(file=text, width=80))
    for event, fields in told:
        show({"event": event, **fields})
    assert text.getvalue().splitlines() == [
        "  asking who the clients are: 2 of 8 answered"
    ]  # a line per two seconds
    standing = follow([{"event": told[0][0], **told[0][1]}], Standing("d", "running"))
    assert "2 of 8" in standing.phase
