"""Error feedback: nothing a codec drops is lost, nothing is counted twice, nothing spoils the client's own files."""

from __future__ import annotations

import numpy as np
import pytest
from real_clients import World, make_maps

from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.packing import round_trip, tensor_digest
from heterotune_flwr.schema import ExchangeConfig
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.feedback import Feedback

SHAPES = {"a": (40, 3), "b": (7,)}
SETTINGS = [{"up": "int8"}, {"up": "nf4"}, {"up": "topk", "top_k": 0.05}]


def changes(round, names=("a", "b")):
    rngs = {name: np.random.default_rng([round, ord(name)]) for name in names}
    return {name: rngs[name].normal(size=SHAPES[name]).astype(np.float32) for name in names}


@pytest.fixture
def store(tmp_path):
    return ClientStore(tmp_path, "run", "client-0001")


@pytest.mark.parametrize("fields", SETTINGS)
def test_what_arrived_and_what_waits_is_all_there_was(store, fields):
    feedback = Feedback.of(ExchangeConfig(**fields), store)
    arrived = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for round in range(1, 9):
        deltas = changes(round)
        seen = round_trip(feedback.add(deltas, SHAPES, round), feedback.codec)
        for name in SHAPES:
            arrived[name] += seen[name]
            wanted[name] += deltas[name]
    waiting = store.part("residual").load(SHAPES)
    for name in SHAPES:
        np.testing.assert_allclose(arrived[name] + waiting[name], wanted[name], atol=1e-4)
        assert waiting[name].any()


def test_a_small_change_that_topk_always_drops_arrives_in_the_end(tmp_path):
    """Nine numbers move by 0.1 a round beside one that moves by 1: without feedback they never move."""
    deltas = {"b": np.array([1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], np.float32)}
    moved = {}
    for on in (True, False):
        exchange = ExchangeConfig(up="topk", top_k=0.14, error_feedback=on)
        feedback = Feedback.of(exchange, ClientStore(tmp_path, "run", f"client-{on}"))
        assert (feedback.store is not None) == on
        sent = [round_trip(feedback.add(deltas, SHAPES, r), feedback.codec) for r in range(1, 61)]
        moved[on] = sum(np.asarray(s["b"]) for s in sent)
    assert not moved[False][1:].any()
    assert (moved[True][1:] > 4.0).all()


@pytest.mark.parametrize("fields", SETTINGS)
def test_a_round_trained_again_sends_the_same_bits(store, fields):
    feedback = Feedback.of(ExchangeConfig(**fields), store)
    first = [feedback.add(changes(r), SHAPES, r) for r in (1, 2, 3)]
    assert tensor_digest(feedback.add(changes(3), SHAPES, 3)) == tensor_digest(first[2])
    assert tensor_digest(feedback.add(changes(1), SHAPES, 1)) == tensor_digest(first[0])


@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp32"])
def test_exact_codecs_keep_nothing(store, codec):
    feedback = Feedback.of(ExchangeConfig(up=codec), store)
    deltas = changes(1)
    assert tensor_digest(feedback.add(deltas, SHAPES, 1)) == tensor_digest(deltas)
    assert not list(store.path.parent.glob("*")) if store.path.parent.exists() else True


@pytest.mark.parametrize("fields", SETTINGS)
def test_a_number_that_is_not_finite_is_not_carried_on(store, fields):
    feedback = Feedback.of(ExchangeConfig(**fields), store)
    spoilt = changes(1)
    spoilt["a"][3, 1], spoilt["b"][2] = np.nan, np.inf
    sent = round_trip(feedback.add(spoilt, SHAPES, 1), feedback.codec)
    assert not all(np.isfinite(value).all() for value in sent.values())  # the gate sees it
    following = feedback.add(changes(2), SHAPES, 2)
    assert all(np.isfinite(value).all() for value in following.values())


def test_the_residual_of_a_tensor_waits_while_another_is_trained(store):
    """RoLoRA trains A and B in turn."""
    feedback = Feedback.of(ExchangeConfig(up="nf4"), store)
    feedback.add(changes(1, ["a"]), SHAPES, 1)
    waiting = store.part("residual").load(SHAPES)["a"]
    sent = feedback.add(changes(2, ["b"]), SHAPES, 2)
    np.testing.assert_array_equal(sent["b"], changes(2)["b"])
    assert set(sent) == {"b"}
    sent = feedback.add(changes(3, ["a"]), SHAPES, 3)
    np.testing.assert_array_equal(sent["a"], changes(3)["a"] + waiting)


def test_another_shape_and_a_damaged_file_start_anew(store):
    feedback = Feedback.of(ExchangeConfig(up="nf4"), store)
    feedback.add(changes(1), SHAPES, 1)
    other = {"a": (2, 3)}
    deltas = {"a": np.ones((2, 3), np.float32)}
    np.testing.assert_array_equal(feedback.add(deltas, other, 2)["a"], deltas["a"])
    path = store.part("residual").path
    path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(feedback.add(deltas, other, 3)["a"], deltas["a"])
    assert store.part("residual").load(other)["a"].shape == (2, 3)


def test_the_residual_has_files_of_its_own(store):
    store.save({"a": np.ones((40, 3), np.float32)}, 1)
    Feedback.of(ExchangeConfig(up="nf4"), store).add(changes(1), SHAPES, 1)
    np.testing.assert_array_equal(store.load(SHAPES)["a"], 1)
    assert store.part("residual").path != store.path
    assert "~" in store.part("residual").path.name  # no client id has one


def test_a_real_client_keeps_its_residual_and_repeats_a_round_to_the_bit(world):
    words = "exchange.up=nf4"
    client = World(world.path, str(world.path / "run.yaml"), words)
    shapes = client.describe(0).shapes
    values = {n: v for n, v in initial_tensors(shapes, 0).items() if ".gate." not in n}

    maps, digest = make_maps(32)

    def answer(round):
        return client.train(0, round, values, sorted(values), maps=maps, digest=digest).deltas

    first = answer(1)
    files = world.path / "run" / "state" / "clients" / "run"
    residual = files / "client-0000~residual.safetensors"
    assert residual.exists()
    assert not any(".gate." in name for name in ClientStore(
        world.path / "run" / "state", "run", "client-0000", "residual").load(shapes))  # fmt: skip
    second = answer(2)
    assert tensor_digest(answer(2)) == tensor_digest(second)
    assert tensor_digest(answer(1)) == tensor_digest(first)
    assert set(client.state(0))
    assert all(".gate." in name for name in client.state(0))
