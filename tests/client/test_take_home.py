"""What a client trains alone, chooses and keeps in its last test."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from real_clients import LORA, LOW_FLOORS, METHOD, World, inline, make_maps
from tiny_backbones import LABELS, write_rows

from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.channels.statistics.record import Request as Statistics
from heterotune_flwr.client import local_training, take_home
from heterotune_flwr.client.take_home import SHARES
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.protocol.messages import (
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    TrainRequest,
)
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.tuning.kept_model import KeptModel, find_kept

MAPS, DIGEST = make_maps(32)


def ask(world, values=None, scopes=("personal",), method=METHOD, rounds=2, **changes):
    header = changes.pop("header", world.header(method, rounds))
    request = EvaluateRequest(header, values or {}, DIGEST, MAPS, list(scopes), keep_as="mine")
    if method.kind != "dema":
        request = replace(request, maps_digest="", maps=None)
    content = replace(request, **changes).to_content("fp32")
    return EvaluateReply.from_content(world.ask(0, EVALUATE, content))


def kept(world, where="run/state") -> KeptModel:
    (found,) = find_kept(world.path / where)
    return found.load()


def trained(world, rounds=2, seed=1):
    """Rounds in which the server sends other values each time; returns the last ones sent."""
    shapes = world.describe(0).shapes
    shared = [name for name in shapes if ".gate." not in name]
    for number in range(1, rounds + 1):
        values = initial_tensors({name: shapes[name] for name in shared}, seed + number)
        world.train(0, number, values, shared, maps=MAPS, digest=DIGEST, steps=20 * number)
    return values


def test_the_model_trained_alone_is_that_of_a_run_without_the_others(world):
    values = trained(world)
    for number in (1, 2):
        world.train(0, number, None, (), "own", maps=MAPS, digest=DIGEST, steps=20 * number)
    reply = ask(world, values)
    record, own = kept(world), world.state(0, "own")
    assert record.alone.keys() == own.keys()
    assert all(np.array_equal(record.alone[name], own[name]) for name in own)
    assert all(np.array_equal(record.as_shared[name], values[name]) for name in values)
    own_test = world.evaluate(0, digest=DIGEST, experiment="own", round=2, test_sets=["personal"])
    assert reply.metrics["alone_personal_loss"] == own_test["personal_loss"]
    again = ask(world, values)
    assert again == reply
    assert all(np.array_equal(kept(world).alone[name], own[name]) for name in own)


def counted(monkeypatch):
    """The rounds that are trained alone from now on, by their headers."""
    done = []
    train_round = local_training.train_round

    def watched(client, header, *more):
        done.append(header)
        return train_round(client, header, *more)

    monkeypatch.setattr(local_training, "train_round", watched)
    return done


def test_the_model_alone_is_trained_again_only_where_it_would_be_another(world, monkeypatch):
    values, done = trained(world), counted(monkeypatch)
    first = ask(world, values)
    assert len(done) == 2 + 2  # and two own rounds of the federated model
    assert ask(world, values) == first
    assert len(done) == 4
    more = {name: value + 1 for name, value in values.items()}
    ask(world, more)  # the model alone is as before, what own rounds begin with is not
    assert len(done) == 6
    shutil.rmtree(world.path / "run/state/kept")
    assert ask(world, values) == first
    assert len(done) == 10
    trained(world, rounds=3)
    ask(world, values, rounds=3)
    assert len(done) == 15


def test_the_model_alone_is_trained_by_the_settings_of_its_rounds(world, monkeypatch):
    values, done = trained(world), counted(monkeypatch)
    odd = {"batch_size": 1, "proximal": 9.0, "warmup_ratio": 0.5, "local_steps": 900}
    ask(world, values, header=world.header(METHOD, 2, **odd))
    assert [header.train.local_steps for header in done] == [20, 40, 40, 40]
    assert all((h.train.batch_size, h.train.proximal) == (4, 0.0) for h in done)
    assert all(h.train.warmup_ratio == 0.0 for h in done)


def test_no_round_of_a_run_with_another_seed_is_trained_alone(world, monkeypatch):
    values, done = trained(world), counted(monkeypatch)
    shapes = world.describe(0).shapes
    header = replace(world.header(METHOD, 2), seed=5)
    shared = [name for name in shapes if ".gate." not in name]
    asked = TrainRequest(header, values, DIGEST, MAPS, shared)
    world.ask(0, TRAIN, asked.to_content("fp32"))
    done.clear()
    ask(world, values, header=header)
    assert [one.round for one in done] == [2, 3, 4]


def test_the_federated_model_goes_home_after_own_rounds_as_in_a_run_that_went_on(world):
    values = trained(world)
    reply = ask(world, values)
    record, metrics = kept(world), reply.metrics
    assert record.own_rounds == metrics["federated_choosing_own_rounds"] > 0
    strategys = world.evaluate(0, values, DIGEST, round=2, test_sets=["personal"])
    assert metrics["personal_loss"] == strategys["personal_loss"]
    assert record.shared_tests == {
        name: value for name, value in metrics.items() if name.startswith("personal_")
    }
    tested = record.tests["federated"]["personal_loss"]
    assert tested == metrics["federated_personal_loss"] != strategys["personal_loss"]
    again, exact = dict(values), World(world.path, overrides="exchange.codec=fp32")
    for number in range(3, 3 + record.own_rounds):
        went = exact.train(0, number, again, list(again), maps=MAPS, digest=DIGEST, steps=40)
        again = {name: value + went.deltas[name] for name, value in again.items()}
    for name, value in (world.state(0) | again).items():
        np.testing.assert_allclose(record.federated[name], value, atol=1e-4)


def test_without_own_rounds_where_they_do_not_help(world, monkeypatch):
    def away(client, header, adapter, *more):
        adapter.load({name: value + 9 for name, value in adapter.read().items()})

    values = trained(world)
    plain = ask(world, values)
    monkeypatch.setattr(local_training, "train_round", away)
    shutil.rmtree(world.path / "run/state/kept")
    reply, record = ask(world, values), kept(world)
    assert (record.own_rounds, record.shared, record.shared_tests) == (0, None, {})
    assert all(np.array_equal(record.federated[name], values[name]) for name in values)
    assert record.tests["federated"]["personal_loss"] == plain.metrics["personal_loss"]
    assert not [name for name in reply.metrics if name.endswith("own_rounds")]


def test_a_full_disk_does_not_cost_the_test(world, monkeypatch, caplog):
    values = trained(world)
    wanted = ask(world, values)

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KeptModel, "save", full)
    reply = ask(world, values)
    assert (wanted.took != "", reply.took) == (True, "")
    assert reply.metrics["personal_loss"] == wanted.metrics["personal_loss"]
    assert "No space left" in caplog.text


def test_the_record_says_what_was_chosen_by_what(world):
    reply = ask(world, trained(world), ("global", "personal"))
    record, metrics = kept(world), reply.metrics
    assert (record.strategy, record.rounds, record.client_id) == ("mine", 2, "client-0000")
    assert (record.took, record.loss, record.labels) == (reply.took, "labels", LABELS)
    assert record.examples == {"train": 16, "choosing": 6, "personal": 4}
    assert record.choosing.examples == metrics["choosing_examples"] == 6
    assert set(record.choosing.models) == set(record.tests) == {"bare", "alone", "federated"}
    for name, measured in record.choosing.models.items():
        assert metrics[f"{name}_choosing_loss"] == pytest.approx(measured.loss)
        assert record.tests[name]["global_loss"] == metrics[f"{name}_global_loss"]
    assert record.maps_digest == DIGEST
    assert record.method.output == 3
    assert np.exp(record.prior).sum() == pytest.approx(1.0)
    untouched = world.evaluate(0, digest=DIGEST, experiment="new", round=0, test_sets=["global"])
    assert metrics["bare_global_loss"] == untouched["global_loss"]


def with_classifier(world, values, bias: float):
    """Metrics, the record, and which share of a classifier that says one thing alone was taken home."""
    weight, biases = np.zeros((3, 8), np.float32), np.array([bias, 0, 0], np.float32)
    found = LinearClassifier(weight, biases).rounded
    asked = {"statistics": Statistics(found).to_payload()}
    metrics, record = ask(world, values, channels=asked).metrics, kept(world)
    return metrics, record, record.head.bias[0] / found.bias[0] if record.head else 0.0


def test_a_classifier_of_others_acts_on_the_federated_model_and_goes_home_where_it_helps(
    world, monkeypatch
):
    monkeypatch.setattr(take_home, "OWN_ROUNDS", 0)
    values = trained(world)
    plain = ask(world, values).metrics
    shares = {}
    for bias in (0.01, -0.01):
        metrics, record, shares[bias] = with_classifier(world, values, bias)
        for name in ("bare_personal_loss", "alone_personal_loss", "bare_choosing_loss"):
            assert metrics[name] == plain[name]
        assert metrics["personal_loss"] != plain["personal_loss"]  # the strategy's, in any case
        tested = record.tests["federated"]["personal_loss"]
        if shares[bias]:
            assert metrics["federated_choosing_loss"] < plain["federated_choosing_loss"]
            assert tested == metrics["personal_loss"]
            assert "federated_personal_loss" not in metrics
        else:
            assert metrics["federated_choosing_loss"] == plain["federated_choosing_loss"]
            assert tested == metrics["federated_personal_loss"] == plain["personal_loss"]
    assert sorted(shares.values()) == [0.0, 1.0]  # to one side it helps, to the other it harms


def test_of_a_classifier_that_is_too_sure_a_client_takes_home_a_share(world, monkeypatch):
    monkeypatch.setattr(take_home, "OWN_ROUNDS", 0)
    values = trained(world)
    helps = max((0.01, -0.01), key=lambda bias: with_classifier(world, values, bias)[2])
    shares = [
        with_classifier(world, values, 100 * size * helps)[2] for size in (0.1, 0.5, 1, 4, 40)
    ]
    assert shares == sorted(shares, reverse=True)
    assert set(shares) <= set(SHARES)
    assert (shares[0], shares[-1] < 0.5) == (1.0, True)


def test_no_model_alone_where_it_would_cost_a_second_run_or_is_the_federated_one(world):
    shapes = world.describe(0, LORA).shapes
    values = initial_tensors(shapes, 3)
    world.train(0, 1, values, shapes, method=LORA)
    reply = ask(world, values, method=LORA, rounds=1)
    assert "alone_personal_loss" not in reply.metrics
    assert kept(world).alone is None
    world.train(0, 1, None, (), maps=MAPS, digest=DIGEST)  # local only: nothing is sent
    assert "alone_personal_loss" not in ask(world, rounds=1).metrics


def test_a_client_without_examples_to_choose_by_has_the_federated_model(world):
    few = World(world.path, overrides="data.examples_per_client=2 data.personal_test_examples=0")
    values = initial_tensors(few.describe(0).shapes, 3)
    reply = ask(few, values, scopes=[])
    assert (reply.took, reply.metrics) == ("federated", {"choosing_examples": 0.0})
    assert (kept(few).choosing.examples, kept(few).took) == (0, "federated")


def test_a_guests_record_says_that_its_rows_are_conversations(world, tmp_path):
    talks = [
        [{"role": "user", "content": f"is {n} so?"}, {"role": "assistant", "content": "it is"}]
        for n in range(96)
    ]
    lines = (json.dumps({"messages": talk}) + "\n" for talk in talks)
    (tmp_path / "said.jsonl").write_text("".join(lines))
    words = f"data.train={tmp_path}/said.jsonl data.test=null data.max_labels=0 types.0.guest=true"
    guest = World(world.path, overrides=f"{words} data.labels=null alignment.output=vocabulary")
    values = initial_tensors(guest.describe(0, LORA).shapes, 3)
    ask(guest, values, scopes=[], method=LORA)
    assert kept(guest).form.turns


def test_a_deployed_node_says_nothing_of_a_choice_by_few_rows_and_counts_it_as_a_test(
    world, folder, tmp_path
):
    rows = tmp_path / "own.jsonl"
    write_rows(rows, 60)
    node = {
        "client-id": "clinic", "backbone": str(folder / "two"), "bits": "bf16", "worker": "off",
        "data": str(rows), "state-dir": str(tmp_path / "mine"),
        "anchors": str(folder / "anchors.txt"), **LOW_FLOORS,
    }  # fmt: skip
    words = f"data.labels=[{','.join(LABELS)}]"
    maps, digest = make_maps(48)

    def asked(seed=3, **floors):
        deployed = World(world.path, inline(world), words, **{**node, **floors})
        values = initial_tensors(deployed.describe(0).shapes, seed)
        return ask(deployed, values, scopes=[], maps=maps, maps_digest=digest)

    told = asked()
    assert told.took
    assert told.metrics["choosing_examples"] == 20
    record = kept(world, "mine")
    assert (record.took, record.client_id, record.choosing.examples) == (told.took, "clinic", 20)
    silent = asked(**{"floor-test-examples": 21})
    assert (silent.took, [n for n in silent.metrics if "choosing" in n]) == ("", [])
    assert kept(world, "mine").took  # chosen all the same, at home
    counts = asked(report="counts-and-loss-only")
    assert {name.rpartition("_")[2] for name in counts.metrics} == {"examples", "loss"}
    assert counts.took == ""
    with pytest.raises(RemoteError, match="budget of 1 tests"):
        asked(seed=4, **{"floor-tests": 1})
