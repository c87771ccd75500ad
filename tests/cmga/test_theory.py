"""docs/theory.md's numbered predictions, on quadratic problems, with the shipped chain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from heterotune_flwr.cmga import (
    GUARDED_CHAIN,
    MEAN_CHAIN,
    Member,
    build_chain,
    make_updates,
    min_norm_weights,
)

SIZE = 6


class Quadratic:
    """f(x) = scale/2 (x - centre)' A (x - centre), eigenvalues of A in [mu, L]; seen through a rotated basis."""

    def __init__(self, seed, mu=0.5, smooth=2.0, scale=1.0, angle=0.0):
        rng = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
        self.matrix = scale * basis @ np.diag(np.linspace(mu, smooth, SIZE)) @ basis.T
        self.centre = rng.normal(size=SIZE)
        turn = np.eye(SIZE)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        self.turn = turn

    def loss(self, x):
        return 0.5 * (x - self.centre) @ self.matrix @ (x - self.centre)

    def gradient(self, x):
        return self.matrix @ (x - self.centre)

    def pseudo_gradient(self, x, steps, rate):
        """-Delta / (H eta) of H steps of gradient descent, in this type's (perhaps rotated) basis."""
        y = self.turn @ x
        for _ in range(steps):
            y = y - rate * self.gradient(y)
        return self.turn.T @ (self.turn @ x - y) / (steps * rate)


def run(types, spec, rounds, gamma, steps=1, rate=1e-3, start=None):
    """Points visited; the chain combines descent directions as it does deltas."""
    chain, x = build_chain(spec), np.zeros(SIZE) if start is None else start
    state, visited = chain.init(), [x]
    for index in range(rounds):
        members = [
            Member(f"c{i}", f"t{i}", -f.pseudo_gradient(x, steps, rate), 1.0)
            for i, f in enumerate(types)
        ]
        result, state = chain.update(make_updates(members, index + 1), state)
        x = x + gamma * result.direction
        visited.append(x)
    return visited


def minimiser(types):
    return np.linalg.solve(sum(f.matrix for f in types), sum(f.matrix @ f.centre for f in types))


def mean_loss(types, x):
    return np.mean([f.loss(x) for f in types])


@pytest.mark.parametrize("seed", range(3))
def test_1_the_mean_falls_at_the_linear_rate(seed):
    types = [Quadratic(3 * seed + i) for i in range(3)]
    smooth = np.linalg.eigvalsh(np.mean([f.matrix for f in types], axis=0))
    gamma, best = 1 / smooth[-1], mean_loss(types, minimiser(types))
    gaps = [mean_loss(types, x) - best for x in run(types, MEAN_CHAIN, 40, gamma)]
    for now, then in itertools.pairwise(gaps):
        assert then <= (1 - gamma * smooth[0]) * now + 1e-12
    assert gaps[-1] < 1e-3 * gaps[0]


def test_2_local_steps_move_the_fixed_point_in_proportion():
    types = [Quadratic(i, mu=0.1 + i) for i in range(3)]
    away = {}
    for steps, rate in ((1, 0.02), (3, 0.01), (5, 0.01), (5, 0.005)):
        end = run(types, MEAN_CHAIN, 800, 0.3, steps, rate)[-1]
        away[steps, rate] = np.linalg.norm(end - minimiser(types))
    assert away[1, 0.02] < 1e-8
    assert away[5, 0.01] == pytest.approx(2 * away[3, 0.01], rel=0.1)
    assert away[5, 0.01] == pytest.approx(2 * away[5, 0.005], rel=0.1)


def test_3_misalignment_is_a_floor_in_proportion_to_it():
    floors = []
    for angle in (0.0, 0.05, 0.1, 0.2):
        types = [Quadratic(0), Quadratic(1), Quadratic(2, angle=angle)]
        ideal = [Quadratic(i) for i in range(3)]
        ends = [run(types, MEAN_CHAIN, rounds, 0.4)[-1] for rounds in (400, 800)]
        norms = [np.linalg.norm(np.mean([f.gradient(x) for f in ideal], axis=0)) for x in ends]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3, abs=1e-9)  # more rounds do not help
        wrong = np.linalg.norm(
            types[2].pseudo_gradient(ends[1], 1, 1e-3) - ideal[2].gradient(ends[1])
        )
        assert norms[1] <= wrong / 3 + 1e-6  # B of the statement
        floors.append(norms[1])
    assert floors[0] < 1e-9
    assert floors[2] == pytest.approx(2 * floors[1], rel=0.15)
    assert floors[3] == pytest.approx(4 * floors[1], rel=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_5_no_type_rises_by_more_than_second_order_and_the_mean_has_no_such_bound(seed):
    types = [Quadratic(10 * seed + i, scale=10.0 if i == 0 else 1.0) for i in range(3)]
    gamma = 0.01

    def worst(spec):
        """Largest rise of any type above gamma^2 L |d|^2 / 2."""
        visited = run(types, spec, 150, gamma)
        excess = -np.inf
        for x, y in itertools.pairwise(visited):
            bound = 0.5 * np.sum((y - x) ** 2)
            for f in types:
                smooth = np.linalg.eigvalsh(f.matrix)[-1]
                excess = max(excess, f.loss(y) - f.loss(x) - smooth * bound)
        return excess

    assert worst(GUARDED_CHAIN) <= 1e-9
    assert worst(MEAN_CHAIN) > 1e-4


def test_6_cmga_stays_near_a_pareto_point_that_no_types_scale_moves():
    points = {}
    for scale in (1.0, 10.0):
        types = [Quadratic(i, scale=scale if i == 0 else 1.0) for i in range(3)]
        x = np.zeros(SIZE)
        for gamma in (0.1, 0.03, 0.01, 0.003, 0.001):
            x = np.mean(run(types, GUARDED_CHAIN, 700, gamma, start=x)[-200:], axis=0)
        gradients = np.stack([f.gradient(x) / np.linalg.norm(f.gradient(x)) for f in types])
        shortest = min_norm_weights(gradients @ gradients.T) @ gradients
        assert np.linalg.norm(shortest) < 0.05
        points[scale] = x
        points[scale, "mean"] = minimiser(types)
    moved = np.linalg.norm(points[1.0] - points[10.0])
    mean_moved = np.linalg.norm(points[1.0, "mean"] - points[10.0, "mean"])
    assert moved < 0.1 * mean_moved


def test_7_with_two_types_every_rule_after_equal_norms_gives_one_direction():
    rng = np.random.default_rng(0)
    for _ in range(20):
        members = [Member(f"c{i}", f"t{i}", rng.normal(size=SIZE), 1.0) for i in range(2)]
        directions = []
        for rule in ("combine", "cagrad", "fedmgda_plus", "aligned_mtl"):
            spec = [
                {"transform": "within_type_mean"},
                {"transform": "equalise_norms"},
                {"transform": rule},
            ]
            chain = build_chain(spec)
            found = chain.update(make_updates(members), chain.init())[0].direction
            directions.append(found / np.linalg.norm(found))
        for direction in directions[1:]:
            np.testing.assert_allclose(direction, directions[0], atol=1e-5)
