"""Whole runs with class statistics: who is asked and told, what a liar changes, what a resume keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from facts import PLAIN, judged, payload, told
from real_clients import DEEP, FEW, run
from toy_federation import ToyFederation, toy_config
from toy_model import LABELS as TOY_LABELS
from toy_model import Backbone
from toy_model import class_sums as toy_sums
from toy_model import latents as toy_latents
from toy_runs import Killed, comparable, killer
from toy_runs import run_all as run_toy

from heterotune_flwr.channels.statistics.class_pool import Classes
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.channels.statistics.server import (
    linear_discriminant,
)
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.strategies import build_strategy


def toy(tmp_path, entry=PLAIN, clients=(2, 2, 2), **server):
    config = toy_config(tmp_path, clients=clients, strategies={"mine": entry}, **server)
    federation = ToyFederation(config)
    session = Session(federation.grid(), config, Journal(tmp_path / "journal"), "toy-0")
    context = StrategyContext("mine", config, 0, session)
    strategy = build_strategy(config.strategies["mine"], context)
    return strategy, federation, session


def asked_of(federation):
    """What every training asked and brought: (client id, round) -> request."""
    return {
        key: Request.from_payload(request.channels["statistics"])
        for key, request in federation.received.items()
        if "statistics" in request.channels
    }


def rounds_of(strategy):
    rounds = [e for e in strategy.outcome.rounds if e["event"] == "round"]
    return [entry["channels"]["statistics"] for entry in rounds]


def test_every_client_is_asked_once_and_all_are_pooled(tmp_path):
    entry = {**PLAIN, "predictions": {"anchors": 16, "pool": 16}}
    strategy, federation, session = toy(tmp_path, entry)
    strategy.start(session.grid)
    requests = asked_of(federation)
    told = {key: request.min_count for key, request in requests.items() if request.min_count}
    assert told == {(f"client-000{n}", 1): 2 for n in range(6)}
    assert all((request.classifier is None) == (key[1] == 1) for key, request in requests.items())
    assert len(requests) == 18
    counts, sums = np.zeros(len(TOY_LABELS)), np.zeros((len(TOY_LABELS), 8))
    for partition in range(6):
        name = federation.type_of(partition)
        meaning, labels = federation.data(partition, 0, 2, 48)
        z = toy_latents(strategy.maps.tensors[f"{name}@fp32"], Backbone(name).states(meaning))
        own = toy_sums(z, labels, 2)
        counts = counts + own.counts
        sums = sums + round_trip({"s": own.sums}, "bf16")["s"]
    (channel,) = (one for one in strategy.channels if one.name == "statistics")
    expected = linear_discriminant(counts, sums, channel.metric, 2.0)
    found = requests["client-0000", 3].classifier
    seen = LinearClassifier(0.5 * expected.weight, 0.5 * expected.bias).rounded
    np.testing.assert_allclose(found.weight, seen.weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.bias, seen.bias, rtol=1e-4, atol=1e-4)
    saved = strategy.shared_tensors()
    np.testing.assert_array_equal(saved["global/statistics.weight"], found.weight)
    np.testing.assert_array_equal(saved["global/statistics.bias"], found.bias)
    rounds = rounds_of(strategy)
    agreements = [known.pop("agreement") for known in rounds]
    assert rounds == [{"clients": 6, "examples": int(counts.sum()), "excluded_types": []}] * 3
    assert agreements[0] == agreements[2]
    assert min(agreements[0].values()) > 0.3


def test_who_predicts_nothing_is_sent_none(tmp_path):
    strategy, federation, session = toy(tmp_path)
    strategy.start(session.grid)
    assert all(request.classifier is None for request in asked_of(federation).values())
    assert "global/statistics.weight" in strategy.shared_tensors()  # the tests have it


def test_types_know_more_with_each_others_classes(tmp_path):
    def accuracy(scope):
        entry = {**PLAIN, "statistics": {"weight": 1.0, "pool_over": scope} if scope else None}
        strategy, _, session = toy(tmp_path, entry, clients=(1, 1, 1), rounds=1)
        strategy.start(session.grid)
        return np.mean([row.global_accuracy for row in strategy.outcome.rows])

    none, own, shared = accuracy(None), accuracy("type"), accuracy("all")
    assert shared > own + 0.03 > none


def test_a_type_by_itself_has_one_of_its_own_classes(tmp_path):
    entry = {
        "_component_": "heterotune_flwr.strategies.within_type.WithinType",
        "statistics": {"weight": 1.0, "pool_over": "type"},
    }
    strategy, _, session = toy(tmp_path, entry, clients=(2, 1, 1), rounds=1)
    strategy.start(session.grid)
    types = strategy.roster.type_keys
    weights = [f"type/{key}/statistics.weight" for key in types]
    saved = strategy.shared_tensors()
    assert [name for name in saved if name.endswith("statistics.weight")] == weights
    assert not np.allclose(saved[weights[0]], saved[weights[1]], atol=0.1)


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path):
    """Half of the clients in each round: some have told before the stop, the others tell after it."""
    server = {"rounds": 4, "participation": 0.5}
    config = toy_config(tmp_path, strategies={"mine": PLAIN}, **server)
    whole = comparable(run_toy(config, ToyFederation(config), directory=tmp_path / "whole"))
    federation = ToyFederation(config)
    with pytest.raises(Killed):  # in round 3, after 3 clients of round 1 and one more of round 2
        run_toy(config, federation, drop=killer(24), directory=tmp_path / "parts")
    before = {key for key, request in asked_of(federation).items() if request.min_count}
    again = run_toy(config, federation, resuming=True, directory=tmp_path / "parts")
    assert comparable(again) == whole
    asked = {key for key, request in asked_of(federation).items() if request.min_count}
    assert len(before) == 4 < len(asked)
    assert len({client_id for client_id, _ in asked}) == len(asked)


def telling(federation, change, liar):
    """``change``: what those whose id or type begins with ``liar`` tell -> another payload."""
    train = federation.train

    def lying(message, context):
        reply = train(message, context)
        found = TrainReply.from_content(reply.content)
        told = found.channels.get("statistics")
        client_id, type_key, *_ = federation.who(context)
        if told is not None and liar in (client_id, type_key):
            channels = {**found.channels, "statistics": change(told)}
            codec = federation.config.exchange.codec
            reply.content = replace(found, channels=channels).to_content(codec)
        return reply

    federation.train = lying


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (told([900.0, *[0.0] * 5], 8), "900 examples, more than the 48 declared"),
        # Whole counts, within the declared number, and a class where nobody has any.
        (told([40.0, *[0.0] * 5], 8, each=30.0), "times as far away as is usual"),
    ],
)
def test_sums_that_cannot_be_are_refused_and_put_on_record(tmp_path, lie, reason):
    strategy, federation, session = toy(tmp_path)
    telling(federation, lambda _: lie.to_payload(), "client-0001")
    strategy.start(session.grid)
    assert strategy.outcome.refused == {"client-0001": {"statistics": 1}}
    (event,) = (
        e
        for e in read_events(tmp_path / "journal" / "rounds.jsonl")
        if e["event"] == "payload_refused"
    )
    assert event["channel"] == "statistics"
    assert reason in event["reason"]
    last = rounds_of(strategy)[-1]
    assert last["examples"] < 5 * 48 + 1
    assert last["clients"] == 5


def test_a_type_that_tells_of_other_classes_is_put_on_record(tmp_path):
    strategy, federation, session = toy(tmp_path)
    wrong = f"{federation.type_of(1)}@fp32"

    def other_labels(given):
        sums = ClassSums.from_payload(given)
        return payload(np.roll(sums.counts, 1), np.roll(sums.sums, 1, axis=0))

    telling(federation, other_labels, wrong)
    strategy.start(session.grid)
    events = read_events(tmp_path / "journal" / "rounds.jsonl")
    (apart,) = (e for e in events if "excluded_type" in e)
    assert (apart["event"], apart["channel"], apart["excluded_type"]) == (
        "channel_note", "statistics", wrong,
    )  # fmt: skip
    assert apart["agreement"] < 0.06
    assert wrong in apart["text"]


def test_honest_clients_of_one_class_are_pooled():
    """One's own class may lie several times as far away as others' do; a lie of many deviations stays refused."""
    near = {
        f"t{n}": Classes(np.array([20.0, 0, 0]), np.full((3, 5), 0.2) * [[20], [0], [0]])
        for n in range(4)
    }
    far = Classes(np.array([0, 20.0, 0]), np.full((3, 5), 1.2) * [[0], [20], [0]])
    lie = Classes(np.array([0, 20.0, 0]), np.full((3, 5), 4.0) * [[0], [20], [0]])
    assert judged({**near, "z": far})[1].log["clients"] == 5
    assert judged({**near, "z": lie})[1].log["clients"] == 4


def test_without_weight_the_channel_is_off(tmp_path):
    strategy, _, session = toy(tmp_path, {**PLAIN, "statistics": {"weight": 0.0}})
    strategy.start(session.grid)
    assert strategy.channels == []


def test_a_type_that_is_not_aligned_neither_tells_nor_hears(tmp_path):
    strategy, federation, session = toy(tmp_path)
    config = strategy.config
    strategy.config = dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, quality_threshold=2.0)
    )
    strategy.start(session.grid)
    assert not asked_of(federation)


def test_the_shipped_strategy_uses_it_on_real_models(world):
    on, off = (
        run(world, DEEP, rounds=2, overrides=f"{FEW} strategies.{DEEP}.statistics={value}")
        for value in ("'{weight: 0.3}'", "null")
    )
    assert rounds_of(on)[0]["clients"] == 4
    assert 40 <= rounds_of(on)[0]["examples"] <= 64
    assert [channel.name for channel in off.channels] == ["predictions"]
    losses = [[row.global_loss for row in s.outcome.rows] for s in (on, off)]
    assert losses[0] != losses[1]
