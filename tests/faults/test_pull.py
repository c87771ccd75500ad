"""How far one client pulls, in every mechanism, whatever it says of itself; and that honest runs do not notice."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from fault_cases import ONE_PARENT
from fault_federation import answering, describing, run, toy_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_faults import CODEC, Hostile

from heterotune_flwr.channels.predictions.server import confidence_weighted_mean
from heterotune_flwr.channels.statistics import class_pool
from heterotune_flwr.channels.statistics.class_pool import ClassPool
from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.cmga import pull
from heterotune_flwr.protocol.messages import TrainReply

LIAR, HUGE, ROUNDS = "client-0003", 10**6, 5
#: One of every way to combine updates.
WAYS = [
    "heterotune", "mean", "within_type", "fedit", "flexlora", "flora", "fedex_lora", "hetlora",
    "heterofl", "scaffold", "fedmosaic", "fedadam",
]  # fmt: skip
#: Those in which examples alone decide who counts.
WEIGHED = (
    "mean",
    "within_type",
    "fedit",
    "flexlora",
    "flora",
    "fedex_lora",
    "heterofl",
    "scaffold",
    "fedmosaic",
)
FLAGS = {"counted_less", "shortened", "payload_refused", "refused"}


@contextlib.contextmanager
def unbounded():
    """As before there were bounds."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (pull, "MOST"),
            (pull, "LOUDEST"),
            (pull, "MOST_TOLD"),
            (class_pool, "FAR"),
            (class_pool, "FAR_CLASS"),
        ):
            stack.enter_context(patch.object(module, name, float("inf")))
        yield


def liar(change, declares=HUGE):
    """A client that declares a million examples, and changes what it answers."""

    def described(told):
        return replace(told, train_examples=declares)

    def trained(content):
        told = TrainReply.from_content(content)
        told = replace(told, metrics={**told.metrics, "examples": float(declares)})
        return change(told).to_content(CODEC)

    def prepare(federation, grid):
        describing(described, [LIAR])(federation, grid)
        answering("train", trained, [LIAR])(federation, grid)

    return prepare


def turned(reply):
    return replace(reply, deltas={name: -value for name, value in reply.deltas.items()})


def sizes(name):
    return (10,) if name in ONE_PARENT else (4, 3, 3)


@functools.cache
def absent(name):
    return run(toy_spec(name), sizes(name), rounds=ROUNDS, prepare=Hostile((LIAR,), None))


@pytest.mark.parametrize("name", WAYS)
def test_a_million_examples_and_a_turned_update_pull_as_one_client(name):
    lied = run(toy_spec(name), sizes(name), rounds=ROUNDS, prepare=liar(turned))
    with unbounded():
        free = run(toy_spec(name), sizes(name), rounds=ROUNDS, prepare=liar(turned))
    before, without = lied.strategy.outcome.before, absent(name).loss((LIAR,))
    start = float(np.mean([row.global_loss for row in before if row.client_id != LIAR]))
    lost = (lied.loss((LIAR,)) - without) / (start - without)
    assert lost < 0.25, lost
    if name in WEIGHED:
        assert free.loss((LIAR,)) > lied.loss((LIAR,)) + 0.1
    (told,) = lied.of("counted_less")
    assert told["clients"] == {LIAR: HUGE}


@pytest.mark.parametrize("name", ["heterotune", "within_discriminant", "fedit", "fedmkt"])
def test_an_honest_run_is_the_same_bit_for_bit(name):
    ended = run(toy_spec(name), rounds=ROUNDS, skew=2.0)
    assert not {event["event"] for event in ended.events} & FLAGS
    assert not [event for event in ended.of("channel_note") if "doubted" in event]
    with unbounded():
        free = run(toy_spec(name), rounds=ROUNDS, skew=2.0)
    for key, value in ended.strategy.shared_tensors().items():
        np.testing.assert_array_equal(value, free.strategy.shared_tensors()[key])


def test_no_client_counts_as_much_more_than_the_median_one():
    assert pull.usual_examples([96, 0, 96, HUGE]) == 96
    # Of two nobody knows who is right: the smaller one.
    assert pull.usual_examples([50, 500]) == 50
    assert pull.usual_examples([70]) == 70
    assert pull.usual_examples([0]) == 0


def test_who_counts_more_cannot_be_longer_too():
    longest = []
    for declares in (48, HUGE):
        scale = liar(lambda reply: scaled(reply, -4.0), declares)
        ended = run(toy_spec("within_type"), rounds=1, prepare=scale)
        (event,) = [one for one in ended.of("shortened") if one["client_id"] == LIAR]
        longest.append(event["to"])
    assert longest[1] == pytest.approx(longest[0] / pull.MOST, rel=0.01)


def scaled(reply, times):
    deltas = {name: np.float32(times) * value for name, value in reply.deltas.items()}
    return replace(reply, deltas=deltas)


# ------------------------------------------------------------------------------------ classes


def pool_of(told, most=100.0, latents=6):
    pool = ClassPool(3, np.ones(latents) / latents, most)
    for index, (counts, sums) in enumerate(told):
        sums = ClassSums(np.array(counts, np.float32), np.array(sums, np.float32))
        pool.add(f"client-{index:04d}", "ab"[index % 2], sums)
    return pool


def classes(rng, count=20, latents=6, offset=0.0):
    """One honest client's: three classes two apart, of spread one."""
    counts = rng.integers(count // 2, count, size=3)
    centres = 2.0 * np.eye(3, latents) + offset
    noise = rng.normal(size=(3, latents)) / np.sqrt(counts)[:, None]
    return counts.astype(float), counts[:, None] * (centres + noise)


def mean_of(pool):
    totals = pool.totals({"a": "", "b": ""}).values()
    counts = sum(total.counts for total in totals)
    return sum(total.sums for total in totals) / np.maximum(counts, 1e-9)[:, None]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**20),
    st.integers(1, 10**6),
    st.floats(-3, 1),
    st.sampled_from(["all", "one"]),
)
def test_one_client_moves_no_class_far_whatever_it_tells(seed, claimed, power, where):
    rng = np.random.default_rng(seed)
    others = [classes(rng) for _ in range(7)]
    counts = np.full(3, float(claimed)) if where == "all" else np.array([float(claimed), 0, 0])
    centres = 2.0 * np.eye(3, 6) + 10.0**power * rng.normal(size=(3, 6))
    lied = pool_of([*others, (counts, counts[:, None] * centres)])
    moved = np.linalg.norm(mean_of(lied) - mean_of(pool_of(others)), axis=1)
    assert moved.max() < 1.2  # of classes that lie 2.8 from each other
    assert sum(t.counts.sum() for t in lied.totals().values()) <= 100 + sum(
        one.sum() for one, _ in others
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 9), st.sampled_from([8, 40, 2000]))
def test_honest_clients_count_in_full_whatever_classes_they_have(seed, clients, count):
    rng = np.random.default_rng(seed)
    told = []
    for _ in range(clients):
        counts, sums = classes(rng, count)
        has = rng.random(3) < 0.6
        told.append((counts * has, sums * has[:, None]))
    told = [one for one in told if one[0].any()]
    pool = pool_of(told, most=1e9)
    totals = pool.totals({"a": "", "b": ""})
    counted = sum((t.counts.sum() for t in totals.values()), 0.0)
    assert counted >= 0.6 * sum(one.sum() for one, _ in told)
    if len(told) < 3:
        assert not pool.shares


def test_a_type_whose_latents_lie_a_little_off_is_not_taken_for_liars():
    rng = np.random.default_rng(0)
    told = [classes(rng, 400, offset=0.3 * (index % 2)) for index in range(8)]
    pool = pool_of(told, most=1e9)
    assert sum(t.counts.sum() for t in pool.totals({"a": "", "b": ""}).values()) > 0.9 * sum(
        one.sum() for one, _ in told
    )


def test_who_has_many_more_counts_as_the_most_and_keeps_its_means():
    rng = np.random.default_rng(1)
    small, large = classes(rng, 20), classes(rng, 4000)
    pool = pool_of([small, large], most=50.0)
    totals = pool.totals({"a": "", "b": ""})
    np.testing.assert_allclose(totals["b"].counts.sum(), 50.0)
    np.testing.assert_allclose(
        totals["b"].sums / totals["b"].counts[:, None], large[1] / large[0][:, None], rtol=1e-5
    )
    assert set(pool.shares) == {"client-0001"}


def test_a_pool_is_the_same_whoever_tells_first_and_after_a_resume():
    rng = np.random.default_rng(2)
    told = [classes(rng) for _ in range(5)]
    one, other = pool_of(told), ClassPool(3, np.ones(6) / 6, 100.0)
    for index in (3, 0, 4, 1, 2):
        sums = ClassSums(told[index][0].astype(np.float32), told[index][1].astype(np.float32))
        other.add(f"client-{index:04d}", "ab"[index % 2], sums)
    again = ClassPool(3, np.ones(6) / 6, 100.0)
    again.load_state_dict(one.state_dict())
    nobody = ClassPool(3, np.ones(6) / 6, 100.0)
    nobody.load_state_dict(nobody.state_dict())
    assert nobody.totals() == {}
    for found in (other, again):
        for key, total in one.totals({"a": "", "b": ""}).items():
            np.testing.assert_array_equal(total.sums, found.totals({"a": "", "b": ""})[key].sums)


def test_a_liar_about_classes_is_put_on_record_and_pulls_little():
    def moved(reply):
        told = reply.channels.get("statistics")
        if told is None:
            return reply
        means = 2.0 * np.eye(6, told.tensors["sums"].shape[1], dtype=np.float32)
        counts = np.full(6, 1e5, np.float32)
        lie = ClassSums(counts, counts[:, None] * means).to_payload()
        return replace(reply, channels={**reply.channels, "statistics": lie})

    lied = run(toy_spec("heterotune"), rounds=ROUNDS, prepare=liar(moved))
    assert LIAR in {event.get("doubted") for event in lied.of("channel_note")}
    assert lied.loss((LIAR,)) < 1.1 * absent("heterotune").loss((LIAR,))
    with unbounded():
        free = run(toy_spec("heterotune"), rounds=ROUNDS, prepare=liar(moved))
    assert free.loss((LIAR,)) > 1.1 * lied.loss((LIAR,))


# ------------------------------------------------------------------------------------ voices


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(3, 12), st.floats(0, 8))
def test_nobody_is_heard_much_louder_than_the_median_client(seed, clients, confidence):
    rng = np.random.default_rng(seed)
    said = rng.dirichlet([1.0] * 5, size=(clients, 30)).astype(np.float32)
    said[0] = np.eye(5)[rng.integers(0, 5, 30)]  # sure of everything
    shares = [1 / clients] * clients
    loudest = confidence_weighted_mean(list(said), shares, confidence)[1][0]
    half = (clients + 1) // 2  # clients at least as loud as the lower of the two middle ones
    assert loudest <= pull.LOUDEST / (pull.LOUDEST + half - 1) + 1e-9
