"""Rules from the literature against their formulas, on vectors small enough for naive oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterotune_flwr.cmga import Member, build_chain, make_updates, min_norm_weights
from heterotune_flwr.errors import ConfigError

RULES = ("cagrad", "fedmgda_plus", "aligned_mtl", "ties")


def combined(vectors, name, between=(), **options):
    """Direction of one client per row, without rescaling."""
    members = [Member(f"c{i}", f"t{i}", np.array(v, float), 1.0) for i, v in enumerate(vectors)]
    rule = {"transform": name, **({"rescale": False} if name != "pcgrad" else {}), **options}
    spec = [{"transform": "within_type_mean"}, *between, rule]
    if name == "pcgrad":
        spec.append({"transform": "combine", "weights": "equal", "rescale": False, "guard": False})
    chain = build_chain(spec)
    return chain.update(make_updates(members), chain.init())[0].direction


def vectors(seed, types, size=6):
    return np.random.default_rng(seed).normal(size=(types, size))


@pytest.mark.parametrize("c", [0.0, 0.3, 0.8])
def test_cagrad_finds_the_best_worst_type_in_its_ball(c):
    for seed in range(10):
        g = vectors(seed, 2)
        mean = g.mean(axis=0)
        d = combined(g, "cagrad", c=c)
        assert np.linalg.norm(d - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9) + 1e-12
        best = -np.inf
        for w in np.linspace(0, 1, 2001):  # every candidate the dual knows
            towards = w * g[0] + (1 - w) * g[1]
            candidate = mean + c * np.linalg.norm(mean) * towards / np.linalg.norm(towards)
            best = max(best, (g @ candidate).min())
        assert (g @ d).min() >= best - 1e-6 * abs(best)


def test_fedmgda_plus_between_mean_and_shortest_point():
    for seed in range(10):
        g = vectors(seed, 3)
        unit = g / np.linalg.norm(g, axis=1, keepdims=True)
        np.testing.assert_allclose(combined(g, "fedmgda_plus", epsilon=0.0), unit.mean(axis=0))
        shortest = min_norm_weights(unit @ unit.T) @ unit
        np.testing.assert_allclose(combined(g, "fedmgda_plus"), shortest, atol=1e-5)
        near = combined(g, "fedmgda_plus", epsilon=0.1)
        lengths = [np.linalg.norm(v) for v in (shortest, near, unit.mean(axis=0))]
        assert lengths[0] - 1e-6 <= lengths[1] <= lengths[2] + 1e-6


def test_aligned_mtl_makes_the_updates_orthogonal_and_equally_long():
    orthogonal = np.diag([1.0, 3.0, 10.0])
    np.testing.assert_allclose(combined(orthogonal, "aligned_mtl"), np.full(3, 1 / 3), atol=1e-9)
    for seed in range(10):
        g = vectors(seed, 3)
        left, values, right = np.linalg.svd(g, full_matrices=False)
        aligned = values.min() * left @ right  # the nearest orthogonal set, as long as the shortest
        np.testing.assert_allclose(combined(g, "aligned_mtl"), aligned.mean(axis=0), atol=1e-9)


def test_ties_by_hand():
    g = [[4.0, -3.0, 0.1, 2.0], [2.0, 5.0, 0.2, -0.1]]
    # Half of each is kept: [4, -3, 0, 0] and [2, 5, 0, 0]; signs +, +: 3 and 5.
    np.testing.assert_allclose(combined(g, "ties", density=0.5), [3.0, 5.0, 0.0, 0.0])


def test_pcgrad_of_two_types():
    for seed in range(20):
        a, b = vectors(seed, 2, 3)
        expected = (a + b) / 2
        if a @ b < 0:
            expected = (a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a) / 2
        np.testing.assert_allclose(combined([a, b], "pcgrad"), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(RULES))
def test_every_rule_is_finite_and_does_not_depend_on_order(seed, types, name):
    g = vectors(seed, types)
    if seed % 3 == 0:
        g[0] = 0.0
    names = [f"t{i}" for i in range(types)]
    found = []
    for order in (range(types), reversed(range(types))):
        members = [Member(f"c{i}", names[i], g[i], 1.0) for i in order]
        chain = build_chain([{"transform": "within_type_mean"}, {"transform": name}])
        found.append(chain.update(make_updates(members), chain.init())[0].direction)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(found[0], found[1])
    length = np.linalg.norm(g.mean(axis=0))
    assert np.linalg.norm(found[0]) == pytest.approx(length) or not found[0].any()


@pytest.mark.parametrize("name", [*RULES, "pcgrad"])
def test_identical_updates_stay_what_they_are(name):
    g = np.tile(vectors(1, 1), (3, 1))
    options = {"density": 1.0} if name == "ties" else {"c": 0.0} if name == "cagrad" else {}
    found = combined(g, name, **options)
    expected = g[0] / np.linalg.norm(g[0]) if name == "fedmgda_plus" else g[0]
    if name == "aligned_mtl":
        expected = expected / np.sqrt(
            3
        )  # of equal updates the smallest eigenvalue that counts is 3 |g|^2
        found = found / np.linalg.norm(found) * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"transform": "cagrad", "c": 1.5}, "cagrad.c is 1.5"),
        ({"transform": "fedmgda_plus", "epsilon": -1}, "epsilon is -1"),
        ({"transform": "ties", "density": 0}, "density is 0"),
        ({"transform": "cagard"}, "did you mean 'cagrad'"),
    ],
)
def test_wrong_options_get_one_clear_line(rule, message):
    with pytest.raises(ConfigError, match=message):
        build_chain([{"transform": "within_type_mean"}, rule])


def test_two_combining_rules_are_refused():
    spec = [{"transform": name} for name in ("within_type_mean", "cagrad", "combine")]
    with pytest.raises(ConfigError, match="must end with one of"):
        build_chain(spec)


def weights_after(pulls, rounds=30, **options):
    """Weights of ``downweight_outliers`` after some rounds in which type i sends ``pulls(round)[i]``."""
    last = {"transform": "combine", "guard": False}
    spec = [
        {"transform": "within_type_mean"},
        {"transform": "downweight_outliers", **options},
        last,
    ]
    chain = build_chain(spec)
    state = chain.init()
    for number in range(1, rounds + 1):
        members = [
            Member(f"c{i}", f"t{i}", np.array(v, float), 1.0) for i, v in enumerate(pulls(number))
        ]
        result, state = chain.update(make_updates(members, number), state)
    return result.log["weights"], result.log["dissent"]


def test_dissent_is_its_formula():
    a, b, c = np.eye(3)
    weights, dissent = weights_after(lambda n: [a, a + b, c], rounds=1, power=2.0, floor=0.5)
    ab = (a + b) / np.sqrt(2)
    expected = {"t0": 1 - a @ (ab + c) / 2, "t1": 1 - ab @ (a + c) / 2, "t2": 1.0}
    assert dissent == pytest.approx(expected)
    raw = {key: (value + 0.5) ** -2 for key, value in expected.items()}
    assert weights == pytest.approx({key: value / sum(raw.values()) for key, value in raw.items()})


def test_who_keeps_pulling_its_own_way_loses_weight_and_does_not_get_it_back():
    rng = np.random.default_rng(0)
    wrong = rng.normal(size=200)

    def pulls(number):
        noise = rng.normal(size=(3, 200))
        return [noise[0] - 0.2 * wrong, noise[1] - 0.2 * wrong, noise[2] + 3 * wrong]

    weights, dissent = weights_after(pulls)
    assert weights["t2"] < 0.01 < dissent["t2"]
    alone, _ = weights_after(
        lambda n: [*rng.normal(size=(2, 200)), wrong]
    )  # the others are at their rest
    assert alone["t2"] < 0.01
    healthy, _ = weights_after(lambda n: rng.normal(size=(3, 2000)))
    assert all(0.15 < weight < 0.6 for weight in healthy.values())


def test_all_of_one_mind_weigh_the_same_and_wrong_options_are_refused():
    weights, dissent = weights_after(lambda n: [[1.0, 2.0]] * 3)
    assert dissent == pytest.approx({"t0": 0, "t1": 0, "t2": 0}, abs=1e-12)
    assert weights == pytest.approx({"t0": 1 / 3, "t1": 1 / 3, "t2": 1 / 3})
    with pytest.raises(ConfigError, match=r"downweight_outliers has decay=1"):
        weights_after(lambda n: [[1.0]], decay=1)
