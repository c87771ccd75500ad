"""Rules about directions against their formulas, on vectors small enough for naive oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterotune_flwr.cmga import Member, build_chain, make_updates

PCGRAD = [{"transform": "pcgrad"}, {"transform": "within_type_mean"}, {"transform": "combine"}]


def combined(vectors, spec):
    """Direction and log of one client per row, each of a type of its own."""
    members = [Member(f"c{i}", f"t{i}", np.array(v, float), 1.0) for i, v in enumerate(vectors)]
    chain = build_chain(spec)
    result = chain.update(make_updates(members), chain.init())[0]
    return result.direction, result.log


def cagrad(c):
    return [{"transform": "cagrad", "c": c}]


def vectors(seed, count, size=6):
    return np.random.default_rng(seed).normal(size=(count, size))


def pcgrad_by_hand(g, order):
    """One order, as the paper writes it: vector by vector."""
    found = []
    for index, own in enumerate(g):
        own = own.copy()
        for other in order:
            if other != index and own @ g[other] < 0:
                own -= (own @ g[other]) / (g[other] @ g[other]) * g[other]
        found.append(own)
    return np.mean(found, axis=0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_pcgrad_is_the_papers_averaged_over_all_orders(count):
    for seed in range(10):
        g = vectors(seed, count, 3)
        orders = itertools.permutations(range(count))
        expected = np.mean([pcgrad_by_hand(g, order) for order in orders], axis=0)
        found, log = combined(g, PCGRAD)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        units = g / np.linalg.norm(g, axis=1, keepdims=True)
        pairs = [units[i] @ units[j] for i, j in itertools.combinations(range(count), 2)]
        assert log["conflict_rate"] == pytest.approx(np.mean(np.array(pairs) < -0.1))


@pytest.mark.parametrize("c", [0.0, 0.3, 0.8])
def test_cagrad_finds_the_best_worst_update_in_its_ball(c):
    for seed in range(10):
        g = vectors(seed, 2)
        mean = g.mean(axis=0)
        d, _ = combined(g, cagrad(c))
        assert np.linalg.norm(d - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9) + 1e-12
        best = -np.inf
        for w in np.linspace(0, 1, 2001):  # every candidate the dual knows
            towards = w * g[0] + (1 - w) * g[1]
            candidate = mean + c * np.linalg.norm(mean) * towards / np.linalg.norm(towards)
            best = max(best, (g @ candidate).min())
        assert (g @ d).min() >= best - 1e-6 * abs(best)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_without_conflict_pcgrad_is_the_mean(seed, count):
    g = np.abs(vectors(seed, count))
    found, log = combined(g, PCGRAD)
    np.testing.assert_allclose(found, g.mean(axis=0), rtol=1e-12)
    assert log["conflict_rate"] == 0


@pytest.mark.parametrize("spec", [PCGRAD, cagrad(0.5)], ids=["pcgrad", "cagrad"])
def test_many_clients_are_no_trouble_and_the_worst_off_is_better_off(spec):
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(6, 300))
    g = groups[np.arange(150) % 6] + rng.normal(size=(150, 300))
    found, _ = combined(g, spec)
    worst = [(g @ d).min() / np.linalg.norm(d) for d in (found, g.mean(axis=0))]
    assert worst[0] > worst[1]


def test_before_the_types_means_clients_of_one_type_may_conflict_too():
    clients = [
        Member("a", "A", np.array([1.0, 0.0]), 1.0),
        Member("b", "A", np.array([-1.0, 1.0]), 1.0),
    ]
    first = build_chain(PCGRAD)
    later = build_chain([PCGRAD[1], PCGRAD[0], PCGRAD[2]])
    one, other = (c.update(make_updates(clients), c.init())[0] for c in (first, later))
    assert one.log["conflict_rate"] == 1.0
    assert other.log["conflict_rate"] == 0.0
    np.testing.assert_allclose(other.direction, [0.0, 0.5])
    np.testing.assert_allclose(one.direction, [0.25, 0.75])
