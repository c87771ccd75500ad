"""The client's four handlers, through Flower's ClientApp and the real wire contract."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from real_clients import LORA, LOW_FLOORS, METHOD, World, deployed_node, inline, make_maps
from tiny_backbones import LABELS

from heterotune_flwr.alignment.align import read_digest
from heterotune_flwr.alignment.views import PIECES
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.symbols import Symbols, unpack_pieces
from heterotune_flwr.data.virtual_clients import expand_types
from heterotune_flwr.dema.bank import initial_tensors, slot_of
from heterotune_flwr.errors import BackboneError, ConfigError, ExchangeError
from heterotune_flwr.exchange.codecs import as_bytes
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import ArrayRecord, ConfigRecord
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.messages import ALIGN, DESCRIBE, Header, TrainReply
from heterotune_flwr.protocol.queries import (
    AlignReply,
    AlignRequest,
    DescribeReply,
    DescribeRequest,
)
from heterotune_flwr.protocol.wire import ERROR_MAPS_MISSING, RemoteError, unpack_mask
from heterotune_flwr.schema import TypeConfig
from heterotune_flwr.strategies import build_strategy

MEAN_CHAIN = [
    {"transform": "within_type_mean"},
    {"transform": "combine", "weights": "examples"},
]


@pytest.mark.parametrize(
    "overrides",
    [
        "'types.0.bits=${oc.env:SECRET}'",
        "'data.labels=[${oc.env:SECRET},b]'",
        "data.label_field=text data.max_labels=1000000",
        "data.text_field=note data.label_field=note",
        "data.labels=[a,b]",
    ],
)
def test_a_server_cannot_read_a_deployed_clients_data_or_environment(
    world, folder, tmp_path, monkeypatch, overrides
):
    monkeypatch.setenv("SECRET", "s3cr3t")
    rows = [
        {"text": f"patient {n}", "note": f"patient {n}", "label": f"ill {n % 3}"} for n in range(40)
    ]
    (folder / "private.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    deployed = World(world.path, inline(world), overrides, **deployed_node(folder, tmp_path))
    request = DescribeRequest(Header("run", 0, METHOD))
    content = deployed.ask(0, DESCRIBE, request.to_content())
    told = "".join(str(dict(record)) for record in content.values())
    assert not re.search("s3cr3t|patient|ill [0-9]", told)
    with pytest.raises(RemoteError):  # nor is it told which files there are
        World(world.path, str(tmp_path / "run.yaml"), **deployed_node(folder, tmp_path)).describe(0)


def shared_names(reply: DescribeReply) -> list[str]:
    return sorted(name for name in reply.shapes if ".global." in name)


def test_describe(world):
    replies = [world.describe(client) for client in range(4)]
    assert [reply.type_key for reply in replies] == ["one@nf4", "two@bf16"] * 2
    assert [reply.client_id for reply in replies] == [f"client-{i:04d}" for i in range(4)]
    first = replies[0]
    assert first.labels == LABELS
    assert (first.hidden, first.layers, first.bits) == (32, 3, "nf4")
    assert (first.train_examples, first.personal_examples) == (16, 4)
    assert first.model_bytes == 2 * first.parameters
    assert first.code_hash == code_hash()
    assert first.shapes == {**replies[1].shapes}
    assert first.vocabulary == replies[1].vocabulary  # one tokenizer
    assert first.pieces > 50
    open_output = world.describe(0, replace(METHOD, output=None))
    assert open_output.shapes == first.shapes  # three labels: r_out = 3
    assert all(name.startswith("lora.") for name in world.describe(0, LORA).shapes)


def asked_factors(world, part="slots"):
    config = compose(world.run_config["config"], world.run_config["overrides"])
    anchors = read_digest(config.alignment, part)
    return AlignRequest(Header("run", 0, METHOD), 1, part=part, anchors=anchors)


def test_a_node_with_other_anchors_than_the_server_says_so_and_reads_nothing(
    world, folder, tmp_path
):
    rows = [
        {"text": line, "answer": "one two"}
        for line in (folder / "anchors.txt").read_text().splitlines()
    ]
    here = tmp_path / "anchors.jsonl"

    def told(overrides="", part="slots", **changes):
        here.write_text("".join(json.dumps({**row, **changes}) + "\n" for row in rows))
        node = {**deployed_node(folder, tmp_path), "anchors": str(here)}
        request = asked_factors(
            World(world.path, overrides=f"alignment.anchors={here} {overrides}"), part
        )
        here.write_text("".join(json.dumps(row) + "\n" for row in rows))
        deployed = World(world.path, inline(world), overrides, **node)
        return AlignReply.from_content(deployed.ask(0, ALIGN, request.to_content())).factors

    assert told()
    assert told(answer="not read for labels")
    for wrong in ({"text": "other"}, {"overrides": "alignment.output=vocabulary", "answer": "one"}):
        with pytest.raises(RemoteError, match="anchors here are not those of the server"):
            told(**wrong)


def test_align_gives_the_same_factors_whatever_is_attached(world):
    request = asked_factors(world)

    def factors():
        return AlignReply.from_content(world.ask(1, ALIGN, request.to_content())).factors

    bare = factors()
    maps, digest = make_maps(48)
    world.train(1, 1, maps=maps, digest=digest, steps=8)
    after = factors()
    assert bare.keys() == after.keys()
    assert all(np.array_equal(bare[name], after[name]) for name in bare)
    assert bare["label_rows"].shape == (3, 48)


def test_a_vocabulary_is_told_and_which_of_others_pieces_it_knows(world):
    def told(symbols):
        request = AlignRequest(Header("run", 0, METHOD), 1, symbols, PIECES)
        reply = AlignReply.from_content(world.ask(0, ALIGN, request.to_content()))
        return as_bytes(reply.factors[PIECES]).tobytes()

    pieces = unpack_pieces(told(b""))
    described = world.describe(0)
    assert Symbols(pieces).digest == described.vocabulary
    assert len(pieces) == described.pieces
    asked = Symbols((pieces[3], b"xylophone", pieces[5]))
    assert unpack_mask(told(asked.to_bytes()), 3).tolist() == [True, False, True]
    with pytest.raises(RemoteError, match="pieces"):
        told(b"no symbols")


def test_train_keeps_what_is_not_expected_and_sends_what_is(world):
    shapes = world.describe(0).shapes
    names = shared_names(world.describe(0))
    maps, digest = make_maps(32)
    start = {n: v + 0.25 for n, v in initial_tensors({n: shapes[n] for n in names}, 0).items()}
    reply = world.train(0, 1, start, names, maps=maps, digest=digest)
    assert sorted(reply.deltas) == names
    assert all(float(np.abs(delta).max()) > 0 for delta in reply.deltas.values())
    assert (reply.client_id, reply.type_key, reply.round) == ("client-0000", "one@nf4", 1)
    assert reply.maps_digest == digest
    assert set(reply.metrics) == {
        "examples", "steps", "learning_rate", "loss", "accuracy", "seconds", "peak_memory_mb",
    }  # fmt: skip
    assert (reply.metrics["examples"], reply.metrics["steps"]) == (16, 3)
    own = world.state(0)
    assert sorted(own) == sorted(set(shapes) - set(names))
    # A name that is expected but not sent starts from the public seed, as the server knows it.
    silent = world.train(0, 1, None, names, experiment="silent", digest=digest)
    explicit = world.train(
        0, 1, initial_tensors({n: shapes[n] for n in names}, 0), names,
        experiment="explicit", digest=digest,
    )  # fmt: skip
    assert all(np.array_equal(silent.deltas[n], explicit.deltas[n]) for n in names)


@pytest.mark.parametrize("method", [METHOD, LORA])
def test_interleaved_clients_of_one_type_do_not_touch_each_other(world, method):
    """Rounds of two clients taken in turn give what each gives alone, and mixed settings too."""
    maps, digest = make_maps(32) if method.kind == "dema" else (None, "")

    def rounds(clients, experiment):
        replies = {client: [] for client in clients}
        for number in (1, 2, 3):
            for client in clients:
                names = shared_names(world.describe(client, method))
                reply = world.train(
                    client, number, None, names, experiment, method, maps=maps, digest=digest
                )
                replies[client].append(reply.deltas)
                if len(clients) > 1:  # other work of the same process in between
                    other = LORA if method.kind == "dema" else METHOD
                    world.describe(client, other)
                    world.describe(1, method)
        return replies

    alone_0, alone_2 = rounds([0], "alone"), rounds([2], "alone")
    together = rounds([0, 2], "together")
    for client, alone in ((0, alone_0[0]), (2, alone_2[2])):
        for a, b in zip(alone, together[client], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
        own, mixed = world.state(client, "alone"), world.state(client, "together")
        assert own.keys() == mixed.keys()
        assert all(np.array_equal(own[name], mixed[name]) for name in own)
    different = world.state(0, "alone"), world.state(2, "alone")
    assert any(not np.array_equal(different[0][n], different[1][n]) for n in different[0])


def test_evaluate_measures_what_training_left(world):
    maps, digest = make_maps(32)
    with pytest.raises(RemoteError) as caught:
        world.evaluate(0, digest=digest)
    assert caught.value.kind == ERROR_MAPS_MISSING
    before = world.evaluate(0, digest=digest, maps=maps, round=0)
    world.train(0, 1, digest=digest, steps=60)
    after = world.evaluate(0, digest=digest)
    assert (before["global_examples"], before["personal_examples"]) == (30, 4)
    assert after["global_loss"] != before["global_loss"]
    assert after["personal_loss"] < before["personal_loss"]
    # The other client of the type has trained nothing: it still is where the first one began.
    other = world.evaluate(2, digest=digest, maps=maps, round=0)
    assert other["global_loss"] == before["global_loss"]


@pytest.mark.parametrize("last", [1, 3])
def test_a_round_that_is_trained_again_starts_where_it_did_before(world, last):
    """A reply that was lost makes the server ask again; the private state must not move twice."""
    maps, digest = make_maps(32)
    names = shared_names(world.describe(0))

    def train(round, experiment):
        return world.train(0, round, None, names, experiment, maps=maps, digest=digest)

    for round in range(1, last + 1):
        once = train(round, "once")
        for _ in range(3 if round == last else 1):
            again = train(round, "again")
    assert all(np.array_equal(once.deltas[n], again.deltas[n]) for n in names)
    single, repeated = world.state(0, "once"), world.state(0, "again")
    assert all(np.array_equal(single[n], repeated[n]) for n in single)
    scores = [
        world.evaluate(0, digest=digest, experiment=name, round=last) for name in ("once", "again")
    ]
    assert scores[0] == scores[1]
    # and the round after it starts from the repeated one
    more = [train(last + 1, name).deltas for name in ("once", "again")]
    assert all(np.array_equal(more[0][n], more[1][n]) for n in names)
    # an evaluation of the round before sees the state that round left
    back = world.evaluate(0, digest=digest, experiment="again", round=last)
    assert back == scores[0]


def test_errors_become_one_line(world):
    maps, digest = make_maps(48)
    with pytest.raises(RemoteError, match=r"the model expects \(8, 32\)") as caught:
        world.train(0, 1, maps=maps, digest=digest)
    assert "\n" not in str(caught.value)
    with pytest.raises(RemoteError, match="not those their digest names"):
        world.train(0, 1, maps=maps, digest="0" * 64)
    with pytest.raises(RemoteError, match=r"does not have: slots\.9"):
        world.train(0, 1, {"slots.9.gate.bias": np.zeros(3, np.float32)}, digest="0" * 64)
    with pytest.raises(RemoteError, match="cannot name a file"):
        world.train(0, 1, experiment="../../outside")
    with pytest.raises(RemoteError, match="at most 3 slots"):
        world.describe(0, replace(METHOD, slots=4))
    bad = World(world.path)
    bad.grid.contexts[bad.nodes[0]].run_config["overrides"] = "data.label_field=answer"
    with pytest.raises(RemoteError, match="no column 'answer'"):
        bad.describe(0)


@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 4), (1,), (0, 0)])
def test_types_come_in_turn_until_each_has_its_clients(counts):
    types = [TypeConfig(str(index), clients=n) for index, n in enumerate(counts)]
    order = [int(item.backbone) for item in expand_types(types)]
    assert [order.count(index) for index in range(len(counts))] == list(counts)
    assert order[: sum(n > 0 for n in counts)] == [i for i, n in enumerate(counts) if n]


def test_deployed_client_uses_its_own_machine_only(world, folder, tmp_path):
    config = compose(str(tmp_path / "run.yaml"))
    node = {
        "client-id": "hospital-7", "backbone": str(folder / "two"), "bits": "int8",
        "data": str(folder / "test.jsonl"), "state-dir": str(tmp_path / "mine"), **LOW_FLOORS,
    }  # fmt: skip
    identity = identify(config, node)
    assert (identity.client_id, identity.spec.type_key) == ("hospital-7", "two@int8")
    assert identity.state_dir == tmp_path / "mine"
    assert identity.data.train == node["data"]
    assert identity.data.test is None  # not the path that came over the network
    own = identity.examples(0)  # of 30 a quarter is held out, and a third to choose by
    assert (len(own.train), len(own.personal_test), len(own.choosing)) == (13, 7, 10)
    with pytest.raises(ConfigError, match="reads no path from the server"):
        identity.alignment(config)
    assert identify(config, {**node, "anchors": "/x.txt"}).alignment(config).anchors == "/x.txt"
    for key, number in (("revision", 1234e5), ("client-id", 7), ("label-field", True)):
        with pytest.raises(ConfigError, match=f"{key} in the node configuration.*in quotes"):
            identify(config, {**node, key: number})
    with pytest.raises(ConfigError, match="lacks data, state-dir"):
        identify(config, {"client-id": "x", "backbone": "tiny-a"})
    with pytest.raises(ConfigError, match="5 nodes but the types have 4 clients"):
        identify(config, {"partition-id": 0, "num-partitions": 5})
    with pytest.raises(BackboneError):
        identify(config, {**node, "bits": "int3"})
    deployed = World(world.path, inline(world), f"data.labels=[{','.join(LABELS)}]", **node)
    described = deployed.describe(0)
    assert (described.client_id, described.labels) == ("hospital-7", LABELS)
    maps, digest = make_maps(48)
    deployed.train(0, 1, maps=maps, digest=digest)
    assert (tmp_path / "mine" / "clients" / "run" / "hospital-7.safetensors").exists()
    with pytest.raises(ExchangeError):
        load_tensors(tmp_path / "run" / "state" / "clients" / "run" / "hospital-7.safetensors")


def test_a_deployed_client_without_a_test_is_measured_on_what_it_holds_back(
    world, folder, tmp_path, caplog
):
    node = {
        "client-id": "hospital-7", "backbone": str(folder / "two"), "bits": "bf16",
        "data": str(folder / "test.jsonl"), "state-dir": str(tmp_path / "mine"),
        "floor-step-examples": 1, "floor-test-examples": 1, "floor-round-examples": 1,
    }  # fmt: skip
    own = f"data.labels=[{','.join(LABELS)}]"
    maps, digest = make_maps(48)
    alone = World(world.path, inline(world), own, **node)
    with caplog.at_level("INFO"):
        alone.describe(0)
    assert "of 30 own examples: no text is cut" in caplog.text
    alone.train(0, 1, maps=maps, digest=digest)
    found = alone.evaluate(0, digest=digest)
    assert found["personal_examples"] > 0
    assert not any(name.startswith("global") for name in found)
    tested = World(world.path, inline(world), own, **node, test=str(folder / "test.jsonl"))
    assert tested.evaluate(0, digest=digest)["global_examples"] > 0
    # The shipped test is for runs about the shipped set, whose labels the server does not name.
    shipped = identify(compose("demo"), node)
    assert len(shipped.global_test()) == 640
    assert identify(compose("demo", own), node).global_test() == []
    same = f"data.labels=[{','.join(shipped.data.labels or ())}]"
    assert len(identify(compose("demo", same), node).global_test()) == 640
    assert identify(compose("demo", "data.name=tickets"), node).global_test() == []


def test_clients_that_train_fewer_slots_share_a_bank_with_the_others(world):
    """Weak clients (``one``) train the last slot, the others both; the lower slot is the mean of those alone."""
    path, overrides = str(world.path / "run.yaml"), (
        "method.slots=2 method.latent=8 method.inner=4 method.experts_global=2 types.0.slots=last-1 "
        "alignment.control=random_maps alignment.count=40 exchange.codec=fp32 server.rounds=1"
    )  # fmt: skip
    config = compose(path, overrides)
    mixed = World(world.path, path, overrides)
    session = Session(mixed.grid, config, Journal(world.path / "journal"), "mixed-0")
    strategy = build_strategy(
        {"_component_": "heterotune_flwr.strategies.HeteroTune", "chain": MEAN_CHAIN},
        StrategyContext("mixed", config, 0, session),
    )
    strategy.prepare(session.grid)
    before = strategy.shared_tensors()
    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), session.grid))
    replies = list(session.grid.send_and_receive(messages))
    found = [TrainReply.from_content(reply.content) for reply in replies]
    slots = {reply.client_id: {slot_of(name) for name in reply.deltas} for reply in found}
    assert [slots[f"client-{i:04d}"] for i in range(4)] == [{1}, {0, 1}, {1}, {0, 1}]
    strategy.aggregate_train(1, replies)
    name = "slots.0.experts.global.0.up.weight"
    strong = [reply for reply in found if name in reply.deltas]
    mean = np.mean([reply.deltas[name] for reply in strong], axis=0)
    changed = strategy.shared_tensors()[f"global/{name}"] - before[f"global/{name}"]
    np.testing.assert_allclose(changed, mean, atol=1e-6)
    assert np.abs(mean).max() > 0
    # The next round's weak client works with that slot, but neither changes nor keeps it.
    messages = list(strategy.configure_train(2, ArrayRecord(), ConfigRecord(), session.grid))
    (reply,) = session.grid.send_and_receive(messages[:1])
    assert {slot_of(n) for n in TrainReply.from_content(reply.content).deltas} == {1}
    assert not list((world.path / "run" / "state").rglob("client-0000.safetensors"))
