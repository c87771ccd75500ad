"""Hundreds of virtual clients: what is looked up once, how many messages are under way, what is told and kept."""

from __future__ import annotations

import dataclasses
import io
import sys
import threading
import time

import numpy as np
import pytest
import torch
from flwr.server.superlink.linkstate import in_memory_linkstate
from rich.console import Console
from toy_federation import ToyFederation, toy_config

from client_app.app import app
from heterotune_flwr.alignment import kept
from heterotune_flwr.alignment.maps import AlignmentResult
from heterotune_flwr.client.identity import expand_types
from heterotune_flwr.cmga import GUARDED_CHAIN
from heterotune_flwr.config.choices import check_choices
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data import partition, sources
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.pools import answers_of
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.exchange import spill
from heterotune_flwr.exchange.spill import Spill
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation import admission, journal, simulated
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.messenger import Enough, make_message, send_and_collect
from heterotune_flwr.federation.sampling import draw_tested
from heterotune_flwr.flower import ClientApp, ConfigRecord, Context, Message, RecordDict
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.status import Standing, follow, render
from heterotune_flwr.reporting.tables import final_table
from heterotune_flwr.run import run_strategies
from heterotune_flwr.schema import (
    AlignmentConfig,
    Config,
    DataConfig,
    MethodConfig,
    TypeConfig,
)
from heterotune_flwr.tuning import state_cache

SMALL = DataConfig(examples_per_client=6, personal_test_examples=2)


def test_a_pool_is_not_hashed_or_sorted_anew_for_every_client(monkeypatch):
    client_examples(SMALL, 0, 50, 0)
    pool, hashed = sources.training_pool(SMALL), []
    assert answers_of(pool) is answers_of(pool)
    monkeypatch.setattr(sources.Example, "__hash__", lambda self: hashed.append(self) or 0)
    monkeypatch.setattr(partition, "generator", None)  # nothing is drawn again
    for client in range(50):
        assert len(client_examples(SMALL, client, 50, 0).train) == 6
    assert not hashed


def test_a_pool_that_was_read_anew_is_another_one(tmp_path):
    path = tmp_path / "own.csv"
    data = dataclasses.replace(SMALL, name="own", train=str(path))
    for labels in (["a", "b"], ["b", "c", "d"]):
        path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels * 9)))
        assert sources.label_set(data) == labels


@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 4), (1,), (0, 0)])
def test_types_come_in_turn_until_each_has_its_clients(counts):
    types = [TypeConfig(str(index), clients=n) for index, n in enumerate(counts)]
    order = [int(item.backbone) for item in expand_types(types)]
    assert [order.count(index) for index in range(len(counts))] == list(counts)
    assert order[: sum(n > 0 for n in counts)] == [i for i, n in enumerate(counts) if n]


def test_maps_are_computed_once_for_equal_factors_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    factors = {"a": {"x": rng.normal(size=(3, 2)).astype(np.float32)}}
    made = AlignmentResult(factors, {"a": [0.5]}, [0.1], 2, {"z": rng.normal(size=4)})
    calls = []

    def compute():
        calls.append(1)
        return made

    given = (factors, AlignmentConfig(), MethodConfig(), ["l"], 0)
    for _ in range(2):
        found = kept.kept_maps(kept.maps_path(*given), compute)
        assert np.array_equal(found.anchor_latents["z"], made.anchor_latents["z"])
        assert np.array_equal(found.maps["a"]["x"], factors["a"]["x"])
        assert (found.quality, found.shrinkage, found.output_width) == ({"a": [0.5]}, [0.1], 2)
    assert len(calls) == 1
    others = [
        ({"a": {"x": factors["a"]["x"] + 1e-6}}, *given[1:]),
        (factors, AlignmentConfig(weighting=1.0), *given[2:]),
        (*given[:3], ["m"], 0),
        (*given[:4], 1),
    ]
    assert len({kept.maps_path(*given), *(kept.maps_path(*other) for other in others)}) == 5
    kept.maps_path(*given).write_bytes(b"torn")
    assert kept.kept_maps(kept.maps_path(*given), compute).output_width == 2
    assert len(calls) == 2


def test_the_disk_is_looked_through_after_enough_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HETEROTUNE_STATES_GB", "0.00064")
    monkeypatch.setattr(state_cache, "written", state_cache.Written())
    looked = []
    prune = state_cache.prune
    monkeypatch.setattr(state_cache, "prune", lambda *a, **k: looked.append(a) or prune(*a, **k))
    for number in range(100):  # 100 x 1,024 bytes; at the first and then every 10 kB
        key = f"{number:02x}" * 16
        state_cache.kept(
            key, 16, 16, torch.device("cpu"), lambda: torch.zeros(16, 16, dtype=torch.float32)
        )
        assert state_cache.usage()[1] <= 640_000 + 10_000 + 2000
    assert 8 <= len(looked) <= 12
    state_cache.forget_states()


def test_memory_counts_a_table_that_is_put_twice_once(monkeypatch):
    monkeypatch.setenv("HETEROTUNE_STATES_MEMORY_GB", "0.000003")
    memory = state_cache.Memory()
    for key in ("a", "b", "a", "b", "a"):
        memory.put(key, torch.zeros(250))
    assert memory.get("a") is not None
    assert memory.get("b") is not None
    memory.put("c", torch.zeros(250))
    memory.put("d", torch.zeros(250))
    assert [memory.get(key) is None for key in "abcd"] == [True, False, False, False]


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
    assert text.getvalue().splitlines() == ["  asked 2 of 8 clients"]  # a line per two seconds
    standing = follow([{"event": told[0][0], **told[0][1]}], Standing("d", "running"))
    assert "2 of 8" in standing.phase


TYPES = {"a": [f"a{i}" for i in range(30)], "b": [f"b{i}" for i in range(300)], "c": ["c0"]}


@pytest.mark.parametrize(
    ("wanted", "counts"),
    [(None, (4, 44, 1)), (10, (1, 9, 1)), (0.1, (3, 30, 1)), (1, (1, 1, 1)), (1e9, (30, 300, 1))],
)
def test_who_is_tested_is_drawn_once_by_the_seed_from_every_type(wanted, counts):
    chosen = draw_tested(TYPES, wanted, 3)
    assert chosen == sorted(set(chosen))
    assert tuple(sum(c in members for c in chosen) for members in TYPES.values()) == counts
    turned = {key: members[::-1] for key, members in reversed(TYPES.items())}
    assert draw_tested(turned, wanted, 3) == chosen
    if wanted == 10:
        assert draw_tested(TYPES, wanted, 4) != chosen


def test_a_small_federation_is_tested_as_a_whole():
    few = {"a": TYPES["a"], "b": TYPES["b"][:18]}
    assert len(draw_tested(few, None, 0)) == 48


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_number_of_tested_clients_that_makes_no_sense_is_refused(wrong):
    config = compose("demo", "")
    config.server.evaluate_clients = wrong
    with pytest.raises(ConfigError, match="evaluate_clients"):
        check_choices(config)


def sampled(tmp_path, name, rounds=3, resuming=False, **server):
    config = toy_config(
        tmp_path, (5, 5, 5), {"heterotune": {"_component_": HETEROTUNE}},
        rounds=rounds, evaluate_clients=6, evaluate_every=1, keep_checkpoints=2, **server,
    )  # fmt: skip
    return run_strategies(
        ToyFederation(config).grid(), config, Journal(tmp_path / name), "toy", resuming
    )


HETEROTUNE = "heterotune_flwr.strategies.HeteroTune"


def test_a_sampled_test_is_the_same_one_every_time_and_says_so(tmp_path):
    run = sampled(tmp_path, "whole")["runs"][0]
    assert run["population"] == 15
    asked = {
        (event["round"], event["client_id"])
        for event in read_events(tmp_path / "whole" / "rounds.jsonl")
        if event["event"] == "bytes" and event["message_type"] == "evaluate"
    }
    who = sorted(row["client_id"] for row in run["clients"])
    assert len(who) == 6
    assert asked == {(round, client) for round in range(4) for client in who}
    assert [row["client_id"] for row in run["clients_before"]] == who
    assert "mean over 6 clients, a fixed sample of 15" in " ".join(
        final_table({"runs": [run]}, tmp_path, 200).split()
    )
    told = [entry for entry in run["rounds"] if entry["event"] == "evaluate"]
    assert {(entry["tested"], entry["clients"]) for entry in told} == {(6, 15)}
    full = sampled(tmp_path, "all", evaluate_before=False)
    assert full["runs"][0]["clients"] == run["clients"]
    assert full["runs"][0]["clients_before"] == []
    assert [e["round"] for e in full["runs"][0]["rounds"] if e["event"] == "evaluate"] == [1, 2, 3]


def test_a_resumed_run_tests_the_same_sample(tmp_path):
    whole = sampled(tmp_path, "whole")["runs"][0]
    sampled(tmp_path, "parts", rounds=2)
    resumed = sampled(tmp_path, "parts", rounds=3, resuming=True)["runs"][0]
    for key in ("clients", "clients_before", "rounds", "population"):
        assert resumed[key] == whole[key]


STRATEGIES = {
    "heterotune": {"_component_": HETEROTUNE},
    "guarded": {"_component_": HETEROTUNE, "chain": [dict(step) for step in GUARDED_CHAIN]},
    "robust": {"_component_": HETEROTUNE, "robust": {"rule": "multi_krum", "hostile": 1}},
    "within": {"_component_": "heterotune_flwr.strategies.WithinType", "robust": "median"},
    "fedit": {
        "_component_": "heterotune_flwr.strategies.FedIT",
        "method": {"kind": "lora", "lora_rank": 4},
    },
    "flora": {
        "_component_": "heterotune_flwr.strategies.FLoRA",
        "method": {"kind": "lora", "lora_rank": 4},
    },
    "scaffold": {
        "_component_": "heterotune_flwr.strategies.Scaffold",
        "train": {"optimizer": "sgd"},
    },
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_that_were_put_aside_give_the_same_bits(tmp_path, monkeypatch, name):
    """All in memory, some in a file, all in a file and read as they arrive; one client sends NaN."""

    def run(where):
        config = toy_config(tmp_path, (4, 4, 4), {name: STRATEGIES[name]}, rounds=2)
        toy = ToyFederation(config, nan={("client-0001", 1)})
        results = run_strategies(toy.grid(), config, Journal(tmp_path / where), "toy")
        banks = load_tensors(next((tmp_path / where / "banks").glob("*.safetensors")))
        return results["runs"][0], banks

    made = []
    real = Spill.put
    monkeypatch.setattr(Spill, "put", lambda *a: made.append(1) or real(*a))
    (one, bank), results = run("memory"), []
    assert not made
    for where, waiting, held in (("some", 10**9, 4000), ("none", 0, 0)):
        monkeypatch.setattr(admission, "WAITING", waiting)
        monkeypatch.setattr(spill, "IN_MEMORY", held)
        results.append(run(where))
        assert made
    assert one["refused"]["client-0001"] == {"tensors": 1}
    for other, same in results:
        assert other["refused"] == one["refused"]
        assert other["clients"] == one["clients"]
        assert same.keys() == bank.keys()
        assert all(np.array_equal(same[key], bank[key]) for key in bank)


def test_what_is_put_aside_is_read_in_parts_and_leaves_no_file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(i, 3)).astype(np.float32) for i in range(4)}
    kept = Spill(tmp_path).put(tensors, 2.5, "f")
    assert list(kept) == list(tensors)
    assert kept.size == 18
    for found in (kept.load(), {name: kept[name] for name in kept}):
        assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    part = kept.only(["t3", "t1"])
    assert (part.norm, part.fingerprint, part.size) == (None, None, 12)
    assert np.array_equal(part.load()["t1"], tensors["t1"])
    assert np.array_equal(
        part.flat(), np.concatenate([tensors[name].reshape(-1) for name in ("t3", "t1")])
    )
    assert np.array_equal(
        kept.flat(), np.concatenate([value.reshape(-1) for value in tensors.values()])
    )
    assert np.array_equal(kept.scaled(np.float32(0.3))["t2"], np.float32(0.3) * tensors["t2"])
    assert not list(tmp_path.glob("*"))


def test_the_status_of_very_many_clients_is_a_line_per_type():
    events = [
        {"event": "describe", "types": {}, "members": {f"c{i}": f"t{i % 2}" for i in range(60)}}
    ]
    events += [
        {"event": "train_reply", "round": 1, "client_id": f"c{i}", "type": f"t{i % 2}"}
        for i in range(10)
    ]
    events += [{"event": "client_failed", "client_id": "c3", "reason": "gone"}] * 2
    text = render(follow(events, Standing("d", "running")), now=0.0).splitlines()
    assert "t0: 30 clients, 5 have trained (5 answers), 0 failures" in text
    assert "t1: 30 clients, 5 have trained (5 answers), 2 failures" in text
    assert "  c3: 2 failures; gone" in text
    assert len(text) < 8
    few = render(follow(events[1:], Standing("d", "running")), now=0.0)
    assert sum(line.startswith("c") for line in few.splitlines()) == 11


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_a_thousand_clients_of_few_texts_each_have_training_and_own_tests(partition):
    data = dataclasses.replace(SMALL, partition=partition)
    for client in (0, 499, 999):
        own = client_examples(data, client, 1000, 0)
        assert own.train
        assert own.personal_test
        assert len(own.train) + len(own.personal_test) <= 8


def test_a_client_without_a_text_is_refused_by_its_number(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(30)))
    data = dataclasses.replace(SMALL, name="own", train=str(path), test=str(path), partition="iid")
    with pytest.raises(DataError, match="client 30 of 40"):
        client_examples(data, 0, 40, 0)
    one = client_examples(data, 0, 30, 0)  # a single text is trained on
    assert (len(one.train), len(one.personal_test)) == (1, 0)
