"""docs/theory.md's numbered statements on the shared step, over many rounds, with the shipped chain.

A test's number is its statement's. Losses are synthetic, seeds are fixed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rounds import SIZE, Bowl, Client, Quadratic, Valleys, mean_loss, minimiser, one_each, run

from heterotune_flwr.cmga import DEFAULT_CHAIN, MEAN_CHAIN

#: The default without its clip.
TYPES_ALIKE = DEFAULT_CHAIN[1:]

# --------------------------------------------------------------------------------- the plain mean


@pytest.mark.parametrize(
    ("spec", "examples", "weights"),
    [
        (MEAN_CHAIN, (1, 1, 1, 1), [1 / 4] * 4),
        (MEAN_CHAIN, (8, 1, 1, 1), [8 / 11, 1 / 11, 1 / 11, 1 / 11]),
        (TYPES_ALIKE, (8, 1, 1, 1), [8 / 18, 1 / 18, 1 / 4, 1 / 4]),
    ],
)
def test_1_the_floor_of_noise_is_sigma_squared_times_the_sum_of_squared_weights(
    spec, examples, weights
):
    """On f = L/2 |x - centre|^2 the bound is met at gamma = 1/L: no smaller one is true."""
    smooth, sigma = 2.0, 3.0
    losses = [Bowl(centre, smooth) for centre in np.random.default_rng(0).normal(size=(4, 100))]
    clients = [
        Client(loss, key, count, sigma)
        for loss, key, count in zip(losses, "aabb", examples, strict=True)
    ]
    floor = sigma**2 * np.sum(np.square(weights))
    for share in (1.0, 0.5):
        gamma = share / smooth
        visited = run(clients, spec, 300, gamma)[20:]
        gradients = [np.array(weights) @ [f.gradient(x) for f in losses] for x in visited]
        found = np.mean(np.sum(np.square(gradients), axis=1))
        assert found == pytest.approx(share * floor / (2 - share), rel=0.06)
        assert found <= 1.06 * gamma * smooth * floor


@pytest.mark.parametrize("steps", [1, 4])
def test_1_the_bound_holds_where_losses_are_not_convex(steps):
    rate, sigma, rounds = 0.05, 0.5, 600
    losses, examples = [Valleys(i) for i in range(3)], np.array([5.0, 2.0, 1.0])
    clients = [
        Client(loss, f"t{i}", n, sigma)
        for i, (loss, n) in enumerate(zip(losses, examples, strict=True))
    ]
    weights = examples / examples.sum()
    largest = np.sqrt(SIZE) + sigma  # of a client's gradient
    drift = rate * largest * (steps - 1) / 2
    for gamma in (1.0, 0.2):
        visited = run(clients, MEAN_CHAIN, rounds, gamma, steps, rate, start=np.full(SIZE, 2.0))
        squares = [np.sum((weights @ [f.gradient(x) for f in losses]) ** 2) for x in visited]
        begin = weights @ [f.loss(visited[0]) for f in losses]
        noise = gamma * sigma**2 * np.sum(weights**2)
        bound = 2 * begin / (gamma * rounds) + drift**2 + noise
        assert min(squares) <= np.mean(squares[:-1]) <= bound
        if steps == 1:
            assert np.mean(squares[:-1]) > 0.2 * bound


@pytest.mark.parametrize("seed", range(3))
def test_2_without_noise_the_mean_falls_at_the_linear_rate(seed):
    losses = [Quadratic(3 * seed + i) for i in range(3)]
    smooth = np.linalg.eigvalsh(np.mean([f.matrix for f in losses], axis=0))
    gamma, best = 1 / smooth[-1], mean_loss(losses, minimiser(losses))
    gaps = [mean_loss(losses, x) - best for x in run(one_each(losses), MEAN_CHAIN, 15, gamma)]
    for now, then in itertools.pairwise(gaps):
        assert then <= (1 - gamma * smooth[0]) * now + 1e-12
    # Of quadratic losses the slowest direction is left at last, and its loss shrinks by the square.
    assert gaps[-1] / gaps[-2] == pytest.approx((1 - gamma * smooth[0]) ** 2, rel=0.02)


def test_3_local_steps_move_the_fixed_point_in_proportion():
    losses = [Quadratic(i, mu=0.1 + i, smooth=2.0 + i) for i in range(3)]
    away = {}
    for steps, rate in ((1, 0.02), (3, 0.01), (5, 0.01), (5, 0.005)):
        end = run(one_each(losses), MEAN_CHAIN, 800, 0.3, steps, rate)[-1]
        away[steps, rate] = np.linalg.norm(end - minimiser(losses))
    assert away[1, 0.02] < 1e-8
    assert away[5, 0.01] == pytest.approx(2 * away[3, 0.01], rel=0.1)
    assert away[5, 0.01] == pytest.approx(2 * away[5, 0.005], rel=0.1)


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.01), (3, 0.01), (9, 0.002)])
def test_3_at_the_fixed_point_the_slope_is_below_beta_and_may_come_near(steps, rate):
    """One loss bends up and one down, so that what local steps do to them adds up; F bends up."""
    smooth = 2.0
    losses = [Bowl([1.0, 0.0], smooth), Bowl([-2.0, 0.0], -smooth)]
    clients = [Client(losses[0], "a", 3.0), Client(losses[1], "b", 2.0)]
    end = run(clients, MEAN_CHAIN, 300, 0.3, steps, rate)[-1]
    slopes = [f.gradient(end) for f in losses]
    largest = max(map(np.linalg.norm, slopes)) * (1 + rate * smooth) ** (steps - 1)
    beta = rate * smooth * largest * (steps - 1) / 2
    found = np.linalg.norm(0.6 * slopes[0] + 0.4 * slopes[1])
    assert found <= beta + 1e-9
    assert found >= 0.7 * beta


# ------------------------------------------------------------------------------------ misalignment


def own_gradients(losses, x):
    """Mean over types of the squared length of each type's own gradient."""
    return np.mean([np.sum(f.gradient(x) ** 2) for f in losses])


@pytest.mark.parametrize("angle", [0.2, 1.0, 3.0])
def test_4_misalignment_that_all_types_share_is_no_floor(angle):
    losses = [Quadratic(7, angle=angle) for _ in range(3)]
    end = run(one_each(losses), MEAN_CHAIN, 200, 0.4)[-1]
    assert own_gradients(losses, end) < 1e-12
    assert mean_loss(losses, end) < 1e-12  # as good as without any misalignment
    assert np.linalg.norm(Quadratic(7).gradient(end)) > 0.1  # but another point


def test_4_the_spread_between_types_is_a_floor_in_proportion_to_it():
    floors = []
    for angle in (0.05, 0.1, 0.2):
        losses = [Quadratic(7), Quadratic(7), Quadratic(7, angle=angle)]
        visited = run(one_each(losses), MEAN_CHAIN, 800, 0.4)
        found = [own_gradients(losses, x) for x in (visited[400], visited[800])]
        gradients = np.array([f.gradient(visited[800]) for f in losses])
        spread = np.mean(np.sum((gradients - gradients.mean(axis=0)) ** 2, axis=1))
        assert found[1] == pytest.approx(found[0], rel=1e-6)  # more rounds do not help
        assert found[1] == pytest.approx(spread, rel=1e-6)
        floors.append(np.sqrt(found[1]))
    assert floors[1] == pytest.approx(2 * floors[0], rel=0.05)
    assert floors[2] == pytest.approx(4 * floors[0], rel=0.1)


@pytest.mark.parametrize(("clients_per_type", "pays"), [(1, True), (4, False)])
def test_6_sharing_pays_while_the_noise_it_saves_is_more_than_the_spread(clients_per_type, pays):
    """Types whose minimisers lie apart, sigma = 3, gamma = 1/L: once well below the threshold, once above."""
    sigma, types, rounds = 3.0, 3, 2500
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(types, SIZE))
    centres -= centres.mean(axis=0)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    saved = sigma**2 / clients_per_type * (1 - 1 / types)
    losses = [Quadratic(0, mu=1.0, smooth=1.0) for _ in range(types)]
    for loss, centre in zip(losses, centres, strict=True):
        loss.centre = 1.5 * centre
    spreads = np.sum(np.square([f.centre - minimiser(losses) for f in losses]), axis=1)
    clients = [
        Client(f, f"t{i}", sigma=sigma)
        for i, f in enumerate(losses)
        for _ in range(clients_per_type)
    ]
    shared = run(clients, MEAN_CHAIN, rounds, 1.0, seed=1)[20:]
    for index, loss in enumerate(losses):
        own = [c for c in clients if c.type_key == f"t{index}"]
        alone = run(own, MEAN_CHAIN, rounds, 1.0, seed=2 + index)[20:]
        squares = [np.mean([np.sum(loss.gradient(x) ** 2) for x in xs]) for xs in (alone, shared)]
        noise = sigma**2 / clients_per_type
        assert squares[0] == pytest.approx(noise, rel=0.06)
        assert squares[1] == pytest.approx(spreads[index] + noise / types, rel=0.06)
        assert (spreads[index] < saved) == (squares[1] < squares[0]) == pays
