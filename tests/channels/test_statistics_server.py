"""The shared discriminant: told once, pooled over types in closed form, heard in predictions and tests alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
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

from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier
from heterotune_flwr.channels.statistics.server import (
    Classes,
    PooledClassifier,
    StatisticsOptions,
    agreement,
    linear_discriminant,
    who_agrees,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import RecordDict
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.strategies.build import check_strategy

#: HeteroTune with nothing but its bank and the discriminant.
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
    nobody = SimpleNamespace(clients={}, labels=["a", "b", "c"], usual_examples=0.0)
    known = PooledClassifier(StatisticsOptions(), spreads, 2.0, nobody)
    np.testing.assert_allclose(known.metric * spreads**2, np.sqrt(spreads))
    equal = PooledClassifier(StatisticsOptions(), np.ones(2), 0.0, nobody)
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


def judged(classes, **options):
    """The server after one client of each type has told these."""
    clients = {
        key: SimpleNamespace(info=SimpleNamespace(type_key=key, train_examples=60))
        for key in classes
    }
    roster = SimpleNamespace(
        clients=clients, labels=["a", "b", "c"], type_keys=sorted(classes), usual_examples=60.0
    )
    server = PooledClassifier(StatisticsOptions(**options), np.ones(5), 0.0, roster)
    replies = [
        SimpleNamespace(
            client_id=key,
            type_key=key,
            class_sums=ClassSums(c.counts.astype(np.float32), c.sums.astype(np.float32)),
        )
        for key, c in classes.items()
    ]
    return server, server.aggregate(replies)[0]


def test_a_type_with_other_labels_keeps_to_its_own_classes():
    classes = {"a": drawn(0), "b": drawn(1, shift=1), "c": drawn(2), "d": drawn(3)}
    server, known = judged(classes)
    assert server.excluded_types == {"b"}
    assert known["excluded_types"] == ["b"]
    assert known["agreement"]["b"] < 0 < 0.7 < min(known["agreement"][key] for key in "acd")
    assert set(server.tensors()) == {
        f"{group}/statistics.{name}" for group in ("global", "type/b") for name in ("weight", "bias")
    }  # fmt: skip
    for key, behind in (("a", "acd"), ("d", "acd"), ("b", "b")):
        counts, sums = (
            sum(getattr(classes[k], what) for k in behind) for what in ("counts", "sums")
        )
        expected = linear_discriminant(counts, sums, server.metric, 2.0)
        np.testing.assert_allclose(server.of(key).weight, 0.1 * expected.weight, rtol=0.01)
    again = PooledClassifier(server.options, np.ones(5), 0.0, server.roster)
    again.load_state_dict(server.state_dict())
    assert again.excluded_types == {"b"}
    assert again.of("a").digest == server.of("a").digest
    everybody, _ = judged(classes, min_cosine=-1.0)
    assert not everybody.excluded_types
    two, _ = judged({"a": drawn(0), "b": drawn(1, shift=1)})
    assert two.excluded_types == {"a", "b"}  # nobody knows who is right
    assert {name.rpartition("/")[0] for name in two.tensors()} == {"type/a", "type/b"}
    assert two.of("guest") is None
    assert server.of("guest").digest == server.of("a").digest
    few, known = judged({"a": drawn(0, count=5), "b": drawn(1, shift=1, count=5)})
    assert not few.excluded_types
    assert "agreement" not in known


@pytest.mark.parametrize(
    ("given_options", "said"),
    [
        ({"weigth": 1}, "no key 'weigth'; known: weight"),
        ({"weight": -0.1}, "not negative"),
        ({"weight": float("nan")}, "not negative"),
        ({"weight": True}, "not negative"),
        ({"min_count": 0}, "whole number from 1"),
        ({"min_count": 1.5}, "whole number"),
        ({"prior": float("inf")}, "not negative"),
        ({"pool_over": "everybody"}, "all or type"),
        ({"min_cosine": 2}, "from -1 to 1"),
        ({"min_cosine": True}, "from -1 to 1"),
        ({"distill_share": 1.1}, "from 0 to 1"),
        ({"distill_share": "half"}, "from 0 to 1"),
        ("yes", "key: value"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(given_options, said):
    with pytest.raises(ConfigError, match=said):
        StatisticsOptions.read(given_options)
    config = compose("demo", "run.compare=[heterotune]")
    entry = {**config.strategies["heterotune"], "statistics": given_options}
    with pytest.raises(ConfigError, match=r"strategies\.heterotune: statistics"):
        check_strategy("heterotune", entry, config)


# ------------------------------------------------------------------------------------- the wire


def told(counts=(3.0, 0.0, 2.0), latent=4, each=1.0):
    counts = np.array(counts, np.float32)
    sums = np.full((len(counts), latent), each, np.float32) * counts[:, None]
    return ClassSums(counts, sums)


def test_both_travel_as_bf16_and_counts_exactly():
    content = RecordDict({})
    sums = ClassSums(
        np.array([257.0, 0.0], np.float32), np.array([[0.1, 1e-6], [0, 0]], np.float32)
    )
    sums.add_to(content)
    read = ClassSums.read(content)
    np.testing.assert_array_equal(read.counts, sums.counts)
    np.testing.assert_array_equal(read.sums, round_trip({"s": sums.sums}, "bf16")["s"])
    np.testing.assert_allclose(read.sums, sums.sums, rtol=2**-8)
    discriminant = LinearClassifier(sums.sums, sums.counts)
    discriminant.add_to(content)
    assert (
        LinearClassifier.read(content).digest == discriminant.rounded.digest != discriminant.digest
    )
    assert discriminant.rounded.rounded.digest == discriminant.rounded.digest
    half = replace(discriminant, distill_share=0.5)
    half.add_to(content)
    assert LinearClassifier.read(content).distill_share == 0.5
    assert half.digest != discriminant.digest
    assert ClassSums.read(RecordDict({})) is None
    assert LinearClassifier.read(RecordDict({})) is None


def test_malformed_ones_are_refused():
    for matrix, vector in (((2, 3), (3,)), ((6,), (6,)), ((2, 3), (2, 1))):
        content = RecordDict({})
        ClassSums(np.zeros(vector, np.float32), np.zeros(matrix, np.float32)).add_to(content)
        with pytest.raises(ExchangeError, match="class sums are"):
            ClassSums.read(content)
    for distill_share in (np.nan, -0.1, 1.5):
        content = RecordDict({})
        LinearClassifier(
            np.zeros((2, 3), np.float32), np.zeros(2, np.float32), distill_share
        ).add_to(content)
        with pytest.raises(ExchangeError, match="from 0 to 1"):
            LinearClassifier.read(content)
    content = RecordDict({})
    LinearClassifier(np.zeros((2, 3), np.float32), np.zeros(2, np.float32)).add_to(content)
    content["class_sums"] = content["statistics"]
    with pytest.raises(ExchangeError, match="class sums hold"):
        ClassSums.read(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sums": np.zeros((2, 4), np.float32)}, "expected 3 x 4"),
        ({"counts": np.array([3, np.nan, 2], np.float32)}, "not finite"),
        ({"sums": np.full((3, 4), np.inf, np.float32)}, "not finite"),
        ({"counts": np.array([3, -2, 2], np.float32)}, "whole numbers from 2"),
        ({"counts": np.array([3.5, 0, 2], np.float32)}, "whole numbers from 2"),
        ({"counts": np.array([3, 0, 1], np.float32)}, "whole numbers from 2"),
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


def test_every_client_is_asked_once_and_all_are_pooled(tmp_path):
    entry = {**PLAIN, "predictions": {"anchors": 16, "pool": 16}}
    strategy, federation, session = toy(tmp_path, entry)
    strategy.start(session.grid)
    asked = {key: request.class_sums for key, request in federation.received.items()}
    assert {round for (_, round), least in asked.items() if least} == {1}
    assert len([least for least in asked.values() if least == 2]) == 6
    assert all(
        (request.discriminant is None) == (round == 1)
        for (_, round), request in federation.received.items()
    )
    counts, sums = np.zeros(len(TOY_LABELS)), np.zeros((len(TOY_LABELS), 8))
    for partition in range(6):
        name = federation.type_of(partition)
        meaning, labels = federation.data(partition, 0, 2, 48)
        z = toy_latents(strategy.maps.tensors[f"{name}@fp32"], Backbone(name).states(meaning))
        own = toy_sums(z, labels, 2)
        counts = counts + own.counts
        sums = sums + round_trip({"s": own.sums}, "bf16")["s"]
    expected = linear_discriminant(counts, sums, strategy.discriminant.metric, 2.0)
    found = federation.received["client-0000", 3].discriminant
    seen = LinearClassifier(0.5 * expected.weight, 0.5 * expected.bias).rounded
    np.testing.assert_allclose(found.weight, seen.weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.bias, seen.bias, rtol=1e-4, atol=1e-4)
    saved = strategy.shared_tensors()
    np.testing.assert_array_equal(saved["global/statistics.weight"], found.weight)
    np.testing.assert_array_equal(saved["global/statistics.bias"], found.bias)
    rounds = [e["statistics"] for e in strategy.outcome.rounds if e["event"] == "round"]
    agreements = [known.pop("agreement") for known in rounds]
    assert rounds == [{"clients": 6, "examples": int(counts.sum()), "excluded_types": []}] * 3
    assert agreements[0] == agreements[2]
    assert min(agreements[0].values()) > 0.3


def test_who_predicts_nothing_is_sent_none(tmp_path):
    strategy, federation, session = toy(tmp_path)
    strategy.start(session.grid)
    assert all(request.discriminant is None for request in federation.received.values())
    assert strategy.discriminant.of("small@fp32") is not None  # the tests have it


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
    with pytest.raises(ConfigError, match=r"statistics\.weight"):
        check_strategy("mine", {**entry, "statistics": {"weight": -1}}, toy_config(tmp_path))


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path):
    """Half of the clients in each round: some have told before the stop, the others tell after it."""
    server = {"rounds": 4, "participation": 0.5}
    config = toy_config(tmp_path, strategies={"mine": PLAIN}, **server)
    whole = comparable(run_toy(config, ToyFederation(config), directory=tmp_path / "whole"))
    federation = ToyFederation(config)
    with pytest.raises(Killed):  # in round 3, after 3 clients of round 1 and one more of round 2
        run_toy(config, federation, drop=killer(24), directory=tmp_path / "parts")
    before = {key for key, request in federation.received.items() if request.class_sums}
    again = run_toy(config, federation, resuming=True, directory=tmp_path / "parts")
    assert comparable(again) == whole
    asked = {key for key, request in federation.received.items() if request.class_sums}
    assert len(before) == 4 < len(asked)
    assert len({client_id for client_id, _ in asked}) == len(asked)


def with_one_that_tells(tmp_path, sums):
    """A finished run in which client 1 tells these sums instead of its own."""
    strategy, federation, _ = toy(tmp_path)
    train = federation.train

    def lying(message, context):
        reply = train(message, context)
        if federation.who(context)[0] == "client-0001" and "class_sums" in reply.content:
            sums.add_to(reply.content)
        return reply

    federation.train = lying
    strategy.start(federation.grid())
    return strategy


def test_sums_that_cannot_be_are_refused_and_put_on_record(tmp_path):
    strategy = with_one_that_tells(tmp_path, told(counts=[900.0, *[0.0] * 5], latent=8))
    assert strategy.outcome.refused == {"client-0001": {"class_sums": 1}}
    events = (tmp_path / "journal" / "rounds.jsonl").read_text()
    assert "class_sums_refused" in events
    assert "900 examples, more than the 48 declared" in events
    last = [e["statistics"] for e in strategy.outcome.rounds if e["event"] == "round"][-1]
    assert last["examples"] < 5 * 48 + 1
    assert last["clients"] == 5


def test_a_type_that_tells_of_other_classes_is_put_on_record(tmp_path):
    config = toy_config(tmp_path, clients=(2, 2, 2), strategies={"mine": PLAIN})
    federation = ToyFederation(config)
    train, wrong = federation.train, federation.type_of(1)

    def other_labels(message, context):
        reply = train(message, context)
        sums = ClassSums.read(reply.content)
        if federation.who(context)[1].startswith(wrong) and sums is not None:
            ClassSums(np.roll(sums.counts, 1), np.roll(sums.sums, 1, axis=0)).add_to(reply.content)
        return reply

    federation.train = other_labels
    run_toy(config, federation, directory=tmp_path / "run")
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    (apart,) = [e for e in map(json.loads, lines) if e["event"] == "types_excluded"]
    assert apart["type"].startswith(wrong)
    assert apart["agreement"] < 0.06


def test_one_that_lies_far_from_all_others_is_not_pooled(tmp_path):
    """Whole counts, within the declared number, and a class where nobody has any."""
    strategy = with_one_that_tells(tmp_path, told(counts=[40.0, *[0.0] * 5], latent=8, each=30.0))
    assert strategy.outcome.refused == {"client-0001": {"class_sums": 1}}
    assert "times as far away as is usual" in (tmp_path / "journal" / "rounds.jsonl").read_text()


def test_honest_clients_of_one_class_are_pooled():
    """One's own class may lie several times as far away as others' do; a lie of many deviations stays refused."""
    near = {
        f"t{n}": Classes(np.array([20.0, 0, 0]), np.full((3, 5), 0.2) * [[20], [0], [0]])
        for n in range(4)
    }
    far = Classes(np.array([0, 20.0, 0]), np.full((3, 5), 1.2) * [[0], [20], [0]])
    lie = Classes(np.array([0, 20.0, 0]), np.full((3, 5), 4.0) * [[0], [20], [0]])
    assert judged({**near, "z": far})[1]["clients"] == 5
    assert judged({**near, "z": lie})[1]["clients"] == 4


def test_without_weight_nothing_is_asked(tmp_path):
    strategy, federation, session = toy(tmp_path, {**PLAIN, "statistics": {"weight": 0.0}})
    strategy.start(session.grid)
    assert not any(request.class_sums for request in federation.received.values())


def test_a_type_that_is_not_aligned_neither_tells_nor_hears(tmp_path):
    strategy, federation, session = toy(tmp_path)
    config = strategy.config
    strategy.config = dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, quality_threshold=2.0)
    )
    strategy.start(session.grid)
    assert not any(request.class_sums for request in federation.received.values())
    assert not any(request.discriminant for request in federation.received.values())


def test_open_text_has_none_and_says_so(world):
    strategy = run(
        world, DEEP, rounds=1,
        overrides=f"{FEW} train.loss=tokens strategies.{DEEP}.statistics.weight=0.1",
    )  # fmt: skip
    assert strategy.discriminant is None
    assert "discriminant_off" in (world.path / "journal" / "rounds.jsonl").read_text()


def test_the_shipped_strategy_uses_it_on_real_models(world):
    on, off = (
        run(world, DEEP, rounds=2, overrides=f"{FEW} strategies.{DEEP}.statistics={value}")
        for value in ("'{weight: 0.3}'", "null")
    )
    rounds = [e for e in on.outcome.rounds if e["event"] == "round"]
    assert rounds[0]["statistics"]["clients"] == 4
    assert 40 <= rounds[0]["statistics"]["examples"] <= 64
    assert off.discriminant is None
    losses = [[row.global_loss for row in s.outcome.rows] for s in (on, off)]
    assert losses[0] != losses[1]
