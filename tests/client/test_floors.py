"""A deployed node's floors: what a server may ask of it, whatever the run says."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from real_clients import METHOD, World, inline, make_maps
from tiny_backbones import LABELS, write_rows

from benchmarks.deployment.runs import NODES, simulated_bank
from heterotune_flwr import plugins
from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.channels.predictions.token_record import TokenRequest
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.channels.statistics.record import Request as Statistics
from heterotune_flwr.client.bounds import check_maps
from heterotune_flwr.client.floors import KEYS, MOST_LOSS, Floors
from heterotune_flwr.client.guard import Guard
from heterotune_flwr.client.holdout import held_size
from heterotune_flwr.client.identify import identify
from heterotune_flwr.client.node_book import FILE, NodeBook
from heterotune_flwr.config.compose import compose
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError, RefusedByNodeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.protocol.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.protocol.wire import ERROR_FAILED, ERROR_REFUSED, RemoteError
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.evaluate import bounded
from heterotune_flwr.tuning.losses import Examples

ROWS = 80
VAST = replace(METHOD, latent=8192, inner=8192)
MAPS, DIGEST = make_maps(48)
WORK = {field.name for field in dataclasses.fields(TrainConfig)}


class Node:
    """One deployed node with the floors as they ship, and a server that asks what it likes."""

    def __init__(self, world, folder, path, rows=ROWS, **settings):
        self.data = path / "own.jsonl"
        write_rows(self.data, rows)
        self.config = {
            "client-id": "clinic", "backbone": str(folder / "two"), "bits": "bf16", "worker": "off",
            "data": str(self.data), "state-dir": str(path / "mine"),
            "anchors": str(folder / "anchors.txt"), **settings,
        }  # fmt: skip
        self.text = inline(world)

    def world(self, overrides=""):
        words = f"data.labels=[{','.join(LABELS)}] train.batch_size=16 {overrides}"
        return World(self.data.parent, self.text, words, **self.config)

    def describe(self, method=METHOD):
        world = self.world()
        content = DescribeRequest(world.header(method)).to_content()
        return DescribeReply.from_content(world.ask(0, DESCRIBE, content))

    def train(self, overrides="", method=METHOD, round=1, **changes):
        """``changes``: of the request, or of its training settings."""
        world, work = self.world(overrides), {"local_steps": 3, "learning_rate": 0.01}
        work |= {key: changes.pop(key) for key in WORK & set(changes)}
        request = TrainRequest(world.header(method, round, **work), {}, DIGEST, MAPS, [])
        content = replace(request, **changes).to_content("fp32")
        return TrainReply.from_content(world.ask(0, TRAIN, content))

    def test(self, overrides="", experiment="run", seed=0, **changes):
        world = self.world(overrides)
        header = replace(world.header(METHOD, experiment=experiment), seed=seed)
        request = EvaluateRequest(header, {}, DIGEST, MAPS, ["personal"])
        content = replace(request, **changes).to_content("fp32")
        return EvaluateReply.from_content(world.ask(0, EVALUATE, content)).metrics

    def identity(self, overrides=""):
        words = f"data.labels=[{','.join(LABELS)}] {overrides}"
        return identify(compose(self.text, words, trusted=False), self.config)


@pytest.fixture
def node(world, folder, tmp_path):
    return Node(world, folder, tmp_path)


def refused(match):
    return pytest.raises(RemoteError, match=match)


def one_number(seed=0):
    """Maps whose every latent is one number of the model."""
    return MAPS | {"slots.0.map.down.weight": np.eye(8, 48, seed, dtype=np.float32)}


def classifier(bias):
    """What brings a classifier that adds the same to all examples."""
    found = LinearClassifier(np.zeros((3, 8), np.float32), np.asarray(bias, np.float32))
    return {"statistics": Statistics(found).to_payload()}


def texts(**changes):
    """What a channel about public texts brings."""
    return replace(DistillationRequest("digest", 40, 8, 1.0), **changes).to_payload()


TENSOR = "slots.0.experts.global.0.up.weight"


@pytest.mark.parametrize(
    ("overrides", "changes", "match"),
    [
        ("train.batch_size=1", {}, "at least 8 examples a step"),
        ("", {"local_steps": 1}, "at least 32 different examples a round"),
        ("", {"local_steps": 10**6}, "local_steps is 1000000"),
        ("train.clip_norm=1e9", {}, r"clip_norm is 1000000000.0"),
        ("", {"maps": one_number(), "maps_digest": tensor_digest(one_number())}, "single numbers"),
        ("", {"learning_rate": 1e6}, "learning_rate"),
        ("train.prior_smoothing=1e-9", {}, "prior_smoothing"),
        ("train.logit_adjustment=1000", {}, "logit_adjustment"),
        ("data.max_length=8", {}, "max_length"),
        ("'data.prompt=Section:'", {}, "must hold {text}"),
        ("'data.prompt={text}{text}'", {}, "hold {text} once"),
        ("data.name=natural_instructions", {}, "simulations"),
        ("", {"method": VAST}, "size of the adapter"),
    ],
)
def test_what_reads_single_records_is_refused(node, overrides, changes, match):
    with refused(match) as caught:
        node.train(overrides, **changes)
    assert caught.value.kind == ERROR_REFUSED
    assert not list((node.data.parent / "mine").rglob("*.safetensors"))  # before anything is kept


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -0.1},
        {"local_steps": 0},
        {"loss": "least squares"},
        {"optimizer": "adagrad"},
        {"losses": {"unheard_of": {}}},
    ],
)
def test_settings_that_no_run_has_are_said_in_one_line_before_any_work(node, settings):
    with refused(next(iter(settings))) as caught:
        node.train(**settings)
    assert "\n" not in str(caught.value)
    assert not list((node.data.parent / "mine").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("channels", "match"),
    [
        ({"control_variates": Payload({TENSOR: np.full((8, 4), 1e9, np.float32)})}, "control variates"),
        (classifier([0, 1000, 2000]), "the classifier"),
        ({"predictions": texts(weight=1e6)}, "weight of what others know"),
        ({"predictions": texts(batch=10**6)}, "public texts of a step"),
        ({"predictions": TokenRequest("digest", 40, 1, 1e6, 0, 9, "", [""]).to_payload()}, "weight of what others"),
    ],
)  # fmt: skip
def test_what_channels_bring_is_bounded_before_any_work(node, channels, match):
    with refused(match) as caught:
        node.train(channels=channels)
    assert caught.value.kind == ERROR_REFUSED
    assert not list((node.data.parent / "mine").rglob("*.safetensors"))


def test_a_channel_that_a_node_does_not_have_is_said_in_one_line(node):
    with refused("uses a channel that is not installed here") as caught:
        node.train(channels={"unheard_of": Payload()})
    assert caught.value.kind == ERROR_FAILED
    assert "unheard_of" not in str(caught.value)  # the server's words stay in the node's own log


@pytest.fixture
def entropy(tmp_path, monkeypatch):
    """An installed package that brings the loss ``entropy``."""
    site = tmp_path / "site"
    metadata = site / "my_losses-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-losses\nVersion: 1.0\n")
    entry = "[heterotune_flwr.losses]\nentropy = my_losses:Entropy\n"
    (metadata / "entry_points.txt").write_text(entry)
    page = (Path(__file__).parents[2] / "docs" / "custom-strategy.md").read_text()
    (site / "my_losses.py").write_text(
        re.findall(r"```python\n(# my_package/losses.*?)```", page, re.S)[0]
    )
    monkeypatch.syspath_prepend(str(site))
    for cached in (plugins.installed, plugins.load_plugin):
        cached.cache_clear()
    yield {"losses": {"entropy": {"weight": 0.3}}}
    for cached in (plugins.installed, plugins.load_plugin):
        cached.cache_clear()


def test_a_loss_of_a_package_acts_where_the_nodes_owner_allows_it(
    world, folder, tmp_path, node, entropy
):
    with refused("this node's owner does not allow") as caught:
        node.train(**entropy)
    assert caught.value.kind == ERROR_REFUSED
    with refused("owner does not allow"):  # nor does it describe itself for such a run
        content = DescribeRequest(node.world().header(METHOD, **entropy)).to_content()
        DescribeReply.from_content(node.world().ask(0, DESCRIBE, content))
    (tmp_path / "open").mkdir()
    willing = Node(world, folder, tmp_path / "open", losses="focal, entropy")
    assert willing.train(**entropy).metrics["steps"] == 3


def test_start_tensors_are_finite_and_of_a_usual_size(node):
    shapes = node.describe().shapes
    name = min(shapes)
    for value in (np.nan, np.inf, 1e6, 100.0):
        tensors = {name: np.full(shapes[name], value, np.float32)}
        with refused("the tensors sent"):
            node.train(tensors=tensors)
        with refused("the tensors sent"):
            node.test(tensors=tensors)
    node.train(tensors={name: np.full(shapes[name], 1.0, np.float32)})


def test_a_test_is_of_the_nodes_own_rows_whatever_a_run_says(node):
    first = node.test()
    assert first["personal_examples"] == held_size(ROWS, Floors()) == 20
    for words in ("data.personal_test_examples=1", "data.personal_test_examples=31 run.seeds=[7]"):
        other = node.test(words, experiment="other", seed=7)
        assert other["personal_examples"] == 20
        assert other["personal_loss"] == first["personal_loss"]
    assert round(first["personal_loss"], 3) == first["personal_loss"]
    with refused("the classifier"):
        node.test("data.personal_test_examples=1", channels=classifier([0, 1000, 2000]))


def test_one_example_moves_a_test_by_no_more_than_its_bound(node):
    worst = node.test(channels=classifier([0, 900, 900]))["personal_loss"]
    assert worst < 20.0


@pytest.mark.parametrize("bias", [1e3, float(np.finfo(np.float32).max)])
def test_one_example_moves_no_loss_by_more_than_its_bound(bias):
    losses = torch.tensor([0.5, bias, float("inf"), float("nan")])
    assert bounded(losses, MOST_LOSS).tolist() == [0.5, 20.0, 20.0, 20.0]
    assert bounded(losses, float("inf")) is losses


def test_every_loss_on_own_rows_is_bounded(world, folder, tmp_path):
    own = tmp_path / "test.jsonl"
    node = Node(world, folder, tmp_path, test=str(own))
    write_rows(own, 30, offset=500)
    told = node.test(channels=classifier([0, 900, 900]), test_sets=["global", "personal"])
    assert 5.0 < told["global_loss"] < 20.0
    big = {"slots.0.map.up.weight": MAPS["slots.0.map.up.weight"] * 800}
    maps = {**MAPS, **big}
    start = {TENSOR: np.full(node.describe().shapes[TENSOR], 25.0, np.float32)}
    digest = tensor_digest(maps)
    steep = node.train(
        tensors=start, maps=maps, maps_digest=digest, learning_rate=1e-6, local_steps=4
    )
    assert 5.0 < steep.metrics["loss"] <= 20.0


@pytest.mark.parametrize(
    ("rows", "told"), [(20, 20), (32, 32), (33, 33), (51, 51), (52, 32), (640, 32)]
)
def test_answers_are_generated_of_all_rows_or_of_many_fewer(node, rows, told):
    assert Guard(node.identity(), compose("demo")).generated(rows) == told


def test_which_rows_of_a_test_file_are_told_is_not_the_runs_choice(world, folder, tmp_path):
    own = tmp_path / "test.jsonl"
    write_rows(own, 33, offset=500)
    node = Node(world, folder, tmp_path, test=str(own))
    first = node.identity().global_test()
    assert len(first) == 33
    for words in ("data.generate=1", "data.generate=100", "data.global_test_examples=32"):
        assert node.identity(words).global_test() == first


def test_a_node_with_few_rows_says_so_and_takes_no_part(world, folder, tmp_path):
    with refused("fewer than 40 examples.*keeps its bare model") as caught:
        Node(world, folder, tmp_path, rows=39).describe()
    assert caught.value.client_id == "clinic"
    few = Node(world, folder, tmp_path, rows=40)
    told = few.describe()
    assert (told.train_examples, told.personal_examples) == (40, 0)
    with refused("no test of at least 20"):
        few.test()


def test_a_test_file_of_ones_own_has_the_same_floor(world, folder, tmp_path):
    own = tmp_path / "test.jsonl"
    node = Node(world, folder, tmp_path, test=str(own))
    for count in (19, 30):
        write_rows(own, count, offset=500)
        for words in ("", "data.global_test_examples=1"):
            told = node.test(words, test_sets=["global", "personal"])
            assert told.get("global_examples") == (30 if count == 30 else None)
            assert told["personal_examples"] == 20


def test_a_budget_is_spent_once_and_what_was_answered_is_free(world, folder, tmp_path):
    node = Node(world, folder, tmp_path, **{"floor-tests": 2, "floor-trainings": 1})
    first = node.test()
    second = node.test(channels=classifier([0, 0, 1]))
    for _ in range(3):  # asked again: the same answer, for nothing
        assert node.test() == first
        assert node.test(channels=classifier([0, 0, 1])) == second
    with refused("budget of 2 tests") as caught:
        node.test(channels=classifier([0, 0, 2]))
    assert caught.value.kind == ERROR_REFUSED
    public = EvaluateRequest(Header("run", 0, METHOD), {}, DIGEST, None, ["global"])
    Guard(node.identity(), compose("demo")).charge(
        public, {}
    )  # of a public test there is no budget
    one, again = node.train(), node.train(maps=None)  # without the maps that are here already
    assert one.metrics["loss"] == again.metrics["loss"]
    with refused("budget of 1 trainings"):
        node.train(learning_rate=0.02)
    node.data.touch()  # the same rows, written again: another answer might come, so it counts
    with refused("budget"):
        node.test()
    node.config["floor-tests"] = 3
    assert node.test() == first


def test_a_training_that_tells_of_held_out_rows_counts_as_a_test(world, folder, tmp_path):
    node = Node(world, folder, tmp_path, **{"floor-tests": 1, "floor-trainings": 3})
    guard = Guard(node.identity(), compose("demo"))

    def charge(round, tests):
        guard.charge(
            TrainRequest(Header("run", 0, METHOD, round), {}, DIGEST, None, []), {}, tests=tests
        )

    for _ in range(2):  # asked again it is free
        charge(1, tests=True)
    with pytest.raises(RefusedByNodeError, match="budget of 1 tests"):
        charge(2, tests=True)
    for round in (2, 3):  # what was refused has cost no training
        charge(round, tests=False)
    with pytest.raises(RefusedByNodeError, match="budget of 3 trainings"):
        charge(4, tests=False)


def test_what_a_node_keeps_of_earlier_rounds_is_part_of_what_is_asked(world, folder, tmp_path):
    node = Node(world, folder, tmp_path, **{"floor-trainings": 3})
    shapes = node.describe().shapes
    start = initial_tensors(shapes, 0)
    zero = {TENSOR: np.zeros(shapes[TENSOR], np.float32)}

    def ask(round, rate):
        node.train(
            round=round, learning_rate=rate, tensors=start, expected=[TENSOR],
            channels={"control_variates": Payload(zero)},
        )  # fmt: skip

    for round, rate in ((1, 0.01), (2, 0.01), (1, 0.02)):  # the node's own variate is another one
        ask(round, rate)
    with refused("budget of 3 trainings"):
        ask(2, 0.01)


def test_own_files_that_a_channel_reads_are_part_of_what_a_test_asks(
    world, folder, tmp_path, monkeypatch
):
    node, own = Node(world, folder, tmp_path, **{"floor-tests": 1}), {"x": np.zeros(1, np.float32)}
    monkeypatch.setattr(client_half("statistics"), "depends_on", lambda self: dict(own))
    node.test(channels=classifier([0, 0, 1]))
    own["x"] = np.ones(1, np.float32)
    with refused("budget of 1 tests"):
        node.test(channels=classifier([0, 0, 1]))


def test_no_two_trainings_or_passes_differ_by_a_single_example(
    world, folder, tmp_path, monkeypatch
):
    node = Node(world, folder, tmp_path, rows=106)  # 60 to train on
    seen, draw = [], Examples.draw

    def watched(*asked):
        seen[-1].append(frozenset(drawn := draw(*asked)))
        return drawn

    monkeypatch.setattr(Examples, "draw", watched)

    def trained(size, steps):
        seen.append([])
        node.train(f"train.batch_size={size}", local_steps=steps, learning_rate=1e-9)
        return seen[-1]

    for size, steps, each in ((8, 6, 8), (15, 3, 17), (17, 3, 17), (25, 2, 26), (51, 1, 52)):
        first, second = trained(size, 2 * steps), trained(size, steps)
        assert {len(batch) for batch in first + second} == {each}
        used = frozenset().union(*first)
        assert len(used) == each * steps <= 60 - 8
        assert used == frozenset().union(*first[:steps]) == frozenset().union(*first[steps:])
        assert len(used ^ frozenset().union(*second)) > 2
        assert trained(size, steps) == second  # asked again: the same answer


def test_lists_of_labels_are_counted_against_a_test_file_too(world, folder, tmp_path):
    own = tmp_path / "test.jsonl"
    write_rows(own, 30)
    node = Node(world, folder, tmp_path, test=str(own), guest="yes", data="", **{"floor-tests": 1})
    node.test(test_sets=["global"])
    with refused("budget of 1 label lists"):
        node.test(f"data.labels=[{','.join(LABELS)},more]", test_sets=["global"])


def test_maps_stay_those_that_a_run_began_with(node):
    node.train()
    other, digest = make_maps(48, seed=1)
    with refused("not those that this run began with"):
        node.train(round=2, maps=other, maps_digest=digest)
    node.train(round=2)
    node.train(maps=other, maps_digest=digest)  # begun anew


def test_maps_of_any_dense_kind_pass_and_degenerate_ones_do_not():
    rng = np.random.default_rng(0)
    check_maps(MAPS)
    for value in (
        np.eye(8, 48),
        np.outer(rng.standard_normal(8), rng.standard_normal(48)),  # one direction, many times
        np.outer(np.ones(8), np.eye(1, 48)),
        np.zeros((8, 48)),
        np.full((8, 48), np.nan),
        rng.standard_normal((8, 48)) * 1e6,
    ):
        with pytest.raises(RefusedByNodeError):
            check_maps(MAPS | {"slots.0.map.down.weight": value.astype(np.float32)})


def test_the_book_is_private_holds_no_text_and_says_when_it_is_damaged(node):
    node.train()
    book = node.data.parent / "mine" / FILE
    assert stat.S_IMODE(book.stat().st_mode) == 0o600
    texts = [json.loads(line)["text"] for line in node.data.read_text().splitlines()]
    content = book.read_bytes()
    assert not [text for text in texts if text.encode() in content]
    assert str(node.data).encode() not in content
    book.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        NodeBook(book.parent)


def test_floors_come_from_the_nodes_configuration_alone(node):
    assert Floors.of({}) == Floors()
    assert Floors.of(Floors(tests=7).to_config()) == Floors(tests=7)
    assert node.identity().floors == Floors()
    assert Guard(node.identity(), compose("demo")).told({"loss": 1.23456, "steps": 3.0}) == {
        "loss": 1.235, "steps": 3.0,
    }  # fmt: skip
    assert identify(compose("demo"), {"partition-id": 0, "num-partitions": 12}).floors is None
    for wrong in (
        {"floor-test": 1},
        {"floor-tests": 0},
        {"floor-tests": "9"},
        {"floor-tests": 1.5},
    ):
        with pytest.raises(ConfigError, match="floor-test"):
            Floors.of(wrong)
    assert all(item.metadata["help"] for item in KEYS.values())


def test_too_large_a_message_and_a_full_state_dir_are_refused(world, folder, tmp_path):
    small = Node(world, folder, tmp_path, **{"floor-message-mb": 0.0001})
    with refused("the message has"):
        small.train()
    node = Node(world, folder, tmp_path, **{"floor-state-gb": 1e-6})
    node.train()
    with refused("keeps more than"):
        node.train(learning_rate=0.02)


def test_an_honest_run_of_real_nodes_passes_their_floors(tmp_path):
    _, bank = simulated_bank(tmp_path / "run")
    assert max(float(np.abs(value).max()) for value in bank.values()) > 0.01
    events = read_events(tmp_path / "run" / "rounds.jsonl")
    assert not [
        e for e in events if e["event"] in ("left_out", "client_failed", "refused", "cooldown")
    ]
    trained = [e["client_id"] for e in events if e["event"] == "train_reply"]
    assert sorted(trained) == sorted([*NODES, *NODES])
    rounds = [e["channels"]["statistics"] for e in events if e["event"] == "round"]
    assert {one["clients"] for one in rounds} == {0}  # what no owner has allowed


def test_a_run_goes_on_without_a_node_whose_budget_is_spent(tmp_path):
    settings = {"client-0002": {"floor-trainings": 1}}
    simulated_bank(tmp_path / "run", rounds=5, settings=settings)
    events = read_events(tmp_path / "run" / "rounds.jsonl")
    (left,) = [
        e for e in events if e["event"] == "left_out"
    ]  # said once, however often it is asked
    assert (left["client_id"], left["round"]) == ("client-0002", 2)
    assert "budget of 1 trainings" in left["reason"]
    assert not [e for e in events if e["event"] in ("client_failed", "refused", "cooldown")]
    trained = [e["client_id"] for e in events if e["event"] == "train_reply"]
    assert trained.count("client-0002") == 1
    assert trained.count("client-0000") == trained.count("client-0001") == 5


def test_a_model_trained_alone_is_taken_off_the_budget_of_trainings_round_by_round(node, caplog):
    spent = {"floor-trainings": 4}
    node.config |= spent
    values = initial_tensors(node.describe().shapes, 3)
    asked = {"keep_as": "mine", "test_sets": [], "tensors": values}
    for number in (1, 2):
        node.train(round=number)
    book, account = NodeBook(node.data.parent / "mine"), node.identity().account(str(node.data))
    header = node.world().header(METHOD, 2)
    assert book.spent(account, "training") == 2
    told = node.test(header=header, **asked)
    assert "alone_choosing_loss" in told
    assert book.spent(account, "training") == 4
    assert node.test(header=header, **asked) == told  # the kept one
    shutil.rmtree(node.data.parent / "mine" / "kept")
    told = node.test(header=header, **asked)
    assert "alone_choosing_loss" not in told
    assert "bare_choosing_loss" in told
    assert "budget of trainings" in caplog.text
    node.config |= {"floor-trainings": 8}
    told = node.test(header=header, **asked)
    assert (
        book.spent(account, "training") == 8
    )  # two rounds alone, two own ones of the federated model
    assert node.test(header=header, **asked) == told
    assert book.spent(account, "training") == 8
