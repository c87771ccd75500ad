"""docs/theory.md's numbered statements on CMGA's clip. A test's number is its statement's."""

from __future__ import annotations

import numpy as np
import pytest
from rounds import SIZE, Quadratic, minimiser, one_each, run

from heterotune_flwr.cmga import DEFAULT_CHAIN, MEAN_CHAIN, Member, build_chain, make_updates

#: CMGA's clip, then the mean over clients.
CLIPPED = [DEFAULT_CHAIN[0], *MEAN_CHAIN]


def direction(spec, gradients, examples=None):
    """Of one client per gradient."""
    counts = np.ones(len(gradients)) if examples is None else examples
    members = [
        Member(f"c{i}", f"t{i}", g, float(n))
        for i, (g, n) in enumerate(zip(gradients, counts, strict=True))
    ]
    chain = build_chain(spec)
    return chain.update(make_updates(members), chain.init())[0].direction


@pytest.mark.parametrize("scale", [-1e6, 0.0, 1e6])
@pytest.mark.parametrize("honest", [3, 4])
def test_7_whatever_one_client_sends_a_step_is_no_longer_than_the_others(scale, honest):
    rng = np.random.default_rng(0)
    for _ in range(20):
        others = rng.normal(size=(honest, SIZE)) * rng.exponential(size=(honest, 1))
        usual = sorted(np.linalg.norm(others, axis=1))[honest // 2]
        lied = [*others, scale * rng.normal(size=SIZE)]
        for spec in (CLIPPED, DEFAULT_CHAIN):
            assert np.linalg.norm(direction(spec, lied)) <= usual
        if scale:
            assert np.linalg.norm(direction(MEAN_CHAIN, lied)) > 100 * usual


@pytest.mark.parametrize("scale", [1.0, -1e6])
def test_8_what_a_client_adds_is_at_most_its_weight_times_the_clip(scale):
    rng = np.random.default_rng(1)
    for _ in range(20):
        gradients, examples = rng.normal(size=(5, SIZE)), rng.integers(1, 9, size=5)
        gradients[0] *= scale
        weights = examples / examples.sum()
        lengths = np.linalg.norm(gradients, axis=1)
        c = np.median(lengths)
        without = sum(
            w * g * min(1, c / length)
            for w, g, length in list(zip(weights, gradients, lengths, strict=True))[1:]
        )
        added = direction(CLIPPED, gradients, examples) - without
        assert np.linalg.norm(added) <= weights[0] * c * (1 + 1e-6)


def test_9_the_clip_moves_the_step_by_no_more_than_what_it_cuts_off():
    rng = np.random.default_rng(0)
    for _ in range(50):
        gradients = rng.normal(size=(5, SIZE)) * rng.exponential(size=(5, 1))
        lengths = np.linalg.norm(gradients, axis=1)
        cut = np.mean(np.maximum(lengths - np.median(lengths), 0))
        away = direction(CLIPPED, gradients) - direction(MEAN_CHAIN, gradients)
        assert np.linalg.norm(away) <= cut * (1 + 1e-9)
        alike = gradients / lengths[:, None]
        np.testing.assert_allclose(direction(CLIPPED, alike), alike.mean(axis=0))


def test_10_ten_times_a_types_loss_moves_the_resting_point_much_less():
    points = {}
    for scale in (1.0, 10.0):
        losses = [Quadratic(i, scale=scale if i == 0 else 1.0) for i in range(5)]
        x = np.zeros(SIZE)
        for gamma in (0.3, 0.1, 0.03):
            x = run(one_each(losses), CLIPPED, 300, gamma, start=x)[-1]
        points[scale] = x
        points[scale, "mean"] = minimiser(losses)
    moved = np.linalg.norm(points[1.0] - points[10.0])
    mean_moved = np.linalg.norm(points[1.0, "mean"] - points[10.0, "mean"])
    assert moved < 0.25 * mean_moved
