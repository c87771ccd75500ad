"""Class statistics: told once, pooled over types in closed form, heard in predictions and tests alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from facts import drawn, facts_of, judged, opened, run_facts, told
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from heterotune_flwr.channels.statistics.agreement import agreement, who_agrees
from heterotune_flwr.channels.statistics.class_pool import Classes
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier, Request
from heterotune_flwr.channels.statistics.server import linear_discriminant
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.payloads import Payload, add_payloads, read_payloads
from heterotune_flwr.strategies.build import check_strategy

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
