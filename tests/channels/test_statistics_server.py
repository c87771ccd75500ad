"""Class statistics: told once, pooled over types in closed form, heard in predictions and tests alone."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from facts import opened, run_facts
from hypothesis import given
from hypothesis import strategies as st
from real_clients import DEEP, FEW, run
from scipy.special import log_softmax
from toy_federation import LABELS as TOY_LABELS
from toy_federation import Backbone, ToyFederation, toy_config
from toy_federation import class_sums as toy_sums
from toy_federation import latents as toy_latents
from toy_runs import Killed, comparable, killer
from toy_runs import run_all as run_toy

from heterotune_flwr.channels.statistics.class_pool import Classes
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.channels.statistics.server import (
    agreement,
    linear_discriminant,
    who_agrees,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.protocol.payloads import Payload, add_payloads, read_payloads
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.strategies.build import check_strategy

#: HeteroTune with nothing but its bank and class statistics.
PLAIN = {
    "_component_": "heterotune_flwr.strategies.heterotune.HeteroTune",
    "statistics": {"weight": 0.5},
}


# ------------------------------------------------------------------------------- the closed form


@given(st.integers(0, 10_000), st.floats(0.0, 5.0))
def test_it_is_the_gaussian_classifier_of_the_pooled_classes(seed, prior):
    """Log densities of Gaussians at the shrunk means, covariance the inverse of the metric, all classes alike."""
    rng = np.random.default_rng(seed)
    latents, labels = rng.normal(size=(40, 5)) + 1.0, rng.integers(0, 3, size=40)
    metric = rng.uniform(0.2, 3.0, size=5)
    counts = np.bincount(labels, minlength=3).astype(float)
    sums = np.stack([latents[labels == c].sum(axis=0) for c in range(3)])
    found = linear_discriminant(counts, sums, metric, prior)
    centre = latents.mean(axis=0)
    means = (sums + prior * centre) / np.maximum(counts + prior, 1e-12)[:, None]
    probes = rng.normal(size=(7, 5))
    distances = ((probes[:, None] - means) ** 2 * metric).sum(axis=-1)
    present = counts + prior > 0
    expected = log_softmax(-0.5 * distances[:, present], axis=1)
    got = log_softmax((probes @ found.weight.T + found.bias)[:, present], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_class_nobody_has_lies_at_the_mean():
    found = linear_discriminant(
        np.array([2.0, 0.0]), np.array([[2.0, 4.0], [0.0, 0.0]]), np.ones(2), prior=2.0
    )
    np.testing.assert_array_equal(
        found.weight, 0
    )  # the other class is all there is, and the mean itself
    np.testing.assert_array_equal(found.bias, 0)


def test_latents_count_by_their_correlation():
    """M = rho / spread^2: in standard deviations, a latent counts by how alike the types see it."""
    spreads = np.array([2.0, 0.5])
    known = opened("statistics", run_facts(spreads=spreads, weighting=2.0))
    np.testing.assert_allclose(known.metric * spreads**2, np.sqrt(spreads))
    equal = opened("statistics", run_facts(spreads=np.ones(2)))
    np.testing.assert_array_equal(equal.metric, 1)


def drawn(seed, shift=0, count=60, labels=3, latents=5):
    """Classes of examples around centres that everybody shares; ``shift``: each is called by another's name."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, labels, size=count)
    z = 3.0 + 2.0 * np.eye(labels, latents)[own] + rng.normal(size=(count, latents))
    called = (own + shift) % labels
    sums = np.stack([z[called == label].sum(axis=0) for label in range(labels)])
    return Classes(np.bincount(called, minlength=labels).astype(float), sums)


def test_agreement_is_the_cosine_of_where_shared_classes_lie():
    one, other, wrong = drawn(0), drawn(1), drawn(2, shift=1)
    metric = np.array([1.0, 2.0, 0.5, 1.0, 1.0])
    found = agreement(one, other, metric)
    weights = 1 / (1 / one.counts + 1 / other.counts)
    sides = []
    for c in (one, other):
        means = c.sums / c.counts[:, None]
        sides.append(
            np.sqrt(metric * weights[:, None])
            * (means - np.average(means, axis=0, weights=weights))
        )
    expected = np.sum(sides[0] * sides[1]) / np.prod([np.linalg.norm(side) for side in sides])
    assert found == pytest.approx(expected)
    assert found == pytest.approx(agreement(other, one, metric))
    assert agreement(one, one, metric) == pytest.approx(1.0)
    assert found > 0.7
    assert agreement(one, wrong, metric) < 0


def test_neither_other_classes_nor_another_domain_are_disagreement():
    metric, one = np.ones(5), drawn(0, labels=5)
    moved = Classes(one.counts, one.sums + 7.0 * one.counts[:, None])
    assert agreement(one, moved, metric) == pytest.approx(1.0)
    kept = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    less = Classes(one.counts * kept, one.sums * kept[:, None])
    assert agreement(one, less, metric) == pytest.approx(1.0)
    rest = Classes(one.counts * (1 - kept), one.sums * (1 - kept)[:, None])
    assert agreement(less, rest, metric) is None  # nothing in common
    assert agreement(one, rest, metric) is None  # two classes
    few = drawn(1, labels=5, count=9)
    assert agreement(one, few, metric) is None
    assert who_agrees({"a": less, "b": rest}, metric, 0.9) == ({}, frozenset())


def payload(counts, sums):
    return ClassSums(np.asarray(counts, np.float32), np.asarray(sums, np.float32)).to_payload()


def facts_of(types):
    """Clients that are called as their types."""
    return run_facts({key: key for key in types}, spreads=np.ones(5), usual_examples=60.0)


def judged(classes, **options):
    """The server's half after one client of each type has told these, and what it made of them."""
    server = opened("statistics", facts_of([*classes, "guest"]), **options)
    told = {key: payload(c.counts, c.sums) for key, c in classes.items()}
    return server, server.aggregate(1, told, [])


def test_a_type_with_other_labels_keeps_to_its_own_classes():
    classes = {"a": drawn(0), "b": drawn(1, shift=1), "c": drawn(2), "d": drawn(3)}
    server, found = judged(classes)
    known = found.log
    assert server.excluded_types == {"b"}
    assert known["excluded_types"] == ["b"]
    assert known["agreement"]["b"] < 0 < 0.7 < min(known["agreement"][key] for key in "acd")
    assert "b" in [note.facts.get("excluded_type") for note in found.notes]
    assert set(server.tensors()) == {
        f"{group}/statistics.{name}" for group in ("global", "type/b") for name in ("weight", "bias")
    }  # fmt: skip
    for key, behind in (("a", "acd"), ("d", "acd"), ("b", "b"), ("guest", "acd")):
        counts, sums = (
            sum(getattr(classes[k], what) for k in behind) for what in ("counts", "sums")
        )
        expected = linear_discriminant(counts, sums, server.metric, 2.0)
        np.testing.assert_allclose(server.classifier(key).weight, 0.1 * expected.weight, atol=0.01)
    again = opened("statistics", facts_of([*classes, "guest"]))
    again.load_state_dict(server.state_dict())
    assert again.excluded_types == {"b"}
    np.testing.assert_array_equal(again.classifier("a").weight, server.classifier("a").weight)
    assert again.requested_min_count("a") == 0 < again.requested_min_count("guest")
    everybody, _ = judged(classes, min_cosine=-1.0)
    assert not everybody.excluded_types


def test_of_two_types_that_disagree_nobody_knows_which_is_right():
    two, _ = judged({"a": drawn(0), "b": drawn(1, shift=1)})
    assert two.excluded_types == {"a", "b"}
    assert {name.rpartition("/")[0] for name in two.tensors()} == {"type/a", "type/b"}
    assert two.classifier("guest") is None
    few, found = judged({"a": drawn(0, count=5), "b": drawn(1, shift=1, count=5)})
    assert not few.excluded_types
    assert "agreement" not in found.log


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": -0.1},
        {"min_count": 0},
        {"prior": float("inf")},
        {"pool_over": "everybody"},
        {"min_cosine": 2},
        {"distill_share": 1.1},
    ],
)
def test_wrong_options_are_named_before_anything_runs(wrong):
    config = compose("demo", "run.compare=[heterotune]")
    entry = {**config.strategies["heterotune"], "statistics": wrong}
    with pytest.raises(
        ConfigError, match=rf"strategies\.heterotune: statistics\.{next(iter(wrong))}"
    ):
        check_strategy("heterotune", entry, config)


# ------------------------------------------------------------------------------------- the wire


def told(counts=(3.0, 0.0, 2.0), latent=4, each=1.0):
    counts = np.array(counts, np.float32)
    sums = np.full((len(counts), latent), each, np.float32) * counts[:, None]
    return ClassSums(counts, sums)


def travelled(record):
    """A record as it comes out of a message."""
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    add_payloads(content, config, {"statistics": record.to_payload()})
    return type(record).from_payload(read_payloads(content, config)["statistics"])


def test_both_travel_as_bf16_and_counts_exactly():
    sums = np.array([[0.1, 1e-6], [0, 0]], np.float32)
    read = travelled(ClassSums(np.array([257.0, 0.0], np.float32), sums))
    np.testing.assert_array_equal(read.counts, [257, 0])
    np.testing.assert_array_equal(read.sums, round_trip({"s": sums}, "bf16")["s"])
    classifier = LinearClassifier(sums, sums[:, 0]).rounded
    read = travelled(Request(classifier, 3, 0.5))
    np.testing.assert_array_equal(read.classifier.weight, classifier.weight)
    np.testing.assert_array_equal(read.classifier.bias, classifier.bias)
    assert (read.min_count, read.distill_share) == (3, 0.5)
    assert travelled(Request(None)) == Request(None)


def test_what_a_message_brings_says_what_it_is():
    """A request that differs in anything is another one, to whoever remembers answers."""
    one = LinearClassifier(np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    digests = {
        request.to_payload().digest
        for request in (Request(one), Request(one, 2), Request(one, 0, 0.5), Request(None))
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("counts", "sums"),
    [
        ([1, 2, 3], (2, 3)),
        ([1] * 6, (6,)),
        ([1.5, 0], (2, 3)),
        ([True, 0], (2, 3)),
        ([-1, 0], (2, 3)),
        ([10**10, 0], (2, 3)),
        (2, (2, 3)),
    ],
)
def test_malformed_sums_are_refused(counts, sums):
    with pytest.raises(ExchangeError, match="count"):
        ClassSums.from_payload(Payload({"sums": np.zeros(sums, np.float32)}, {"counts": counts}))


def test_malformed_classifiers_are_refused():
    weight, bias = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    fields = {"min_count": 0, "distill_share": 0.5}
    for wrong in (
        {"weight": weight},
        {"weight": weight, "bias": bias, "more": bias},
        {"weight": weight, "bias": weight},
        {"weight": bias, "bias": bias},
    ):
        with pytest.raises(ExchangeError, match="a classifier"):
            Request.from_payload(Payload(wrong, fields))
    for share in (np.nan, -0.1, 1.5, "half", None):
        with pytest.raises(ExchangeError, match="share"):
            Request.from_payload(Payload({}, {**fields, "distill_share": share}))
    with pytest.raises(ExchangeError, match="min_count"):
        Request.from_payload(Payload({}, {"distill_share": 0.5}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sums": np.zeros((2, 4), np.float32)}, "expected 3 x 4"),
        ({"sums": np.full((3, 4), np.inf, np.float32)}, "not finite"),
        ({"counts": np.array([3, 0, 1], np.float32)}, "nor from 2"),
        ({"counts": np.array([30, 0, 2], np.float32)}, "32 examples, more than the 5"),
        ({"counts": np.array([3, 0, 0], np.float32)}, "classes without examples"),
        ({"sums": np.ones((3, 4), np.float32) * [[3], [0], [2e3]]}, "1e.03 standard deviations"),
    ],
)
def test_what_a_client_cannot_have_is_refused(change, said):
    ok = told()
    assert ok.check(3, np.full(4, 0.5), 2, 5) == pytest.approx(2.0)
    with pytest.raises(ExchangeError, match=said):
        replace(ok, **change).check(3, np.ones(4), 2, 5)


# ----------------------------------------------------------------------------------- whole runs


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
