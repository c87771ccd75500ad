"""docs/theory.md's numbered statements on CMGA's step, over many rounds, with the shipped chain.

A test's number is its statement's. Losses are synthetic, seeds are fixed.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from rounds import SIZE, Bowl, Client, Quadratic, minimiser, one_each, run

from heterotune_flwr.cmga import DEFAULT_CHAIN, MEAN_CHAIN, Member, build_chain, make_updates

#: The shipped clip before a mean over clients.
CLIPPED = [DEFAULT_CHAIN[0], *MEAN_CHAIN]


def lower_median(lengths):
    moving = sorted(length for length in lengths if length > 0)
    return moving[(len(moving) - 1) // 2]


class Round:
    """Clients of several types that send something, and the shipped step."""

    def __init__(self, rng, chain):
        count = rng.integers(3, 10)
        self.types = [f"t{i}" for i in rng.permutation(np.arange(count) % rng.integers(1, 4))]
        self.examples = rng.integers(1, 20, size=count).astype(float)
        self.sent = rng.exponential(size=(count, 1)) * rng.normal(size=(count, SIZE))
        self.chain = chain

    @property
    def weights(self):
        """Equal over types, by examples inside."""
        whose = np.array(self.types)
        inside = [self.examples[whose == own].sum() for own in self.types]
        return self.examples / inside / len(set(self.types))

    def step(self, sent):
        """The direction and c."""
        members = [
            Member(f"c{i}", key, vector, count)
            for i, (key, vector, count) in enumerate(
                zip(self.types, sent, self.examples, strict=True)
            )
        ]
        found = self.chain.update(make_updates(members), self.chain.init())[0].direction
        return found, lower_median(np.linalg.norm(sent, axis=1))


def test_7_no_client_pulls_further_than_its_weight_of_the_median():
    rng, chain = np.random.default_rng(0), build_chain(DEFAULT_CHAIN)
    met = 0
    for _ in range(200):
        now = Round(rng, chain)
        one = rng.integers(len(now.sent))
        weight = now.weights[one]
        direction, median = now.step(now.sent)
        assert np.linalg.norm(direction) <= median * (1 + 1e-12)
        other = now.sent.copy()
        other[one] = rng.choice([0.0, 1e-3, 1.0, 1e4]) * rng.normal(size=SIZE)
        moved, then = now.step(other)
        bound = weight * (median + then) + abs(median - then)
        assert np.linalg.norm(moved - direction) <= bound * (1 + 1e-9)
        rest = sorted(np.linalg.norm(np.delete(now.sent, one, axis=0), axis=1))
        assert not [length for length in rest if min(median, then) < length < max(median, then)]
        assert max(median, then) <= rest[len(rest) // 2] * (1 + 1e-12)
        if np.linalg.norm(now.sent, axis=1)[one] > median:
            met += 1  # c does not change, and the bound is met by the opposite, however loud
            for times in (-1.0, -1e6):
                other[one] = times * now.sent[one]
                opposite, then = now.step(other)
                assert then == pytest.approx(median)
                assert np.linalg.norm(opposite - direction) == pytest.approx(2 * weight * median)
            other[one] = 1e6 * now.sent[one]
            np.testing.assert_allclose(now.step(other)[0], direction, atol=1e-9)
    assert met > 40


def test_7_a_loss_that_is_louder_than_the_median_may_be_louder_still():
    """Clients around zero, and one that is far from what it wants in every round."""
    visited = []
    for scale in (1.0, 100.0):
        losses = [Quadratic(i) for i in range(4)] + [Quadratic(9, scale=20.0 * scale)]
        losses[4].centre = np.full(SIZE, 50.0)
        visited.append(run(one_each(losses), CLIPPED, 200, 0.1))
    np.testing.assert_allclose(visited[0], visited[1], atol=1e-9)
    assert np.linalg.norm(visited[0][-1] - visited[0][0]) > 0.5


class Liar:
    """Sends something else than the gradient of the loss the others have."""

    def __init__(self, loss, lie):
        self.right, self.lie, self.centre = loss, lie, loss.centre

    def gradient(self, x):
        return self.lie(self.right.gradient(x))


LIES = {
    "opposite and loud": lambda g: -1e3 * g,
    "opposite": lambda g: -g,
    "sideways and loud": lambda g: 1e3 * np.roll(g, 1),
    "hardly anything": lambda g: -1e-3 * g,
    "nothing": np.zeros_like,
}


@pytest.mark.parametrize("lie", LIES)
def test_8_fewer_than_half_cannot_turn_the_step(lie):
    loss, share, gamma = Quadratic(3), 0.4, 0.05
    clients = [Client(loss, "a", 2.0) for _ in range(3)]
    clients += [Client(Liar(loss, LIES[lie]), "b", 2.0) for _ in range(2)]
    visited = run(clients, CLIPPED, 150, gamma)
    for now, then in itertools.pairwise(visited):
        least = gamma * (1 - 2 * share - gamma * 2.0 / 2) * np.sum(loss.gradient(now) ** 2)
        fall = loss.loss(now) - loss.loss(then)
        assert fall >= least * (1 - 1e-6) - 1e-15
        if lie == "opposite and loud":
            assert fall <= 1.4 * least
    assert loss.loss(visited[-1]) < 0.5 * loss.loss(visited[0])


def test_8_one_client_turns_the_plain_mean_and_half_of_the_weight_the_clipped_one():
    loss = Quadratic(3)
    liar = Liar(loss, LIES["opposite and loud"])
    clients = [*(Client(loss, "a") for _ in range(4)), Client(liar, "b")]
    plain = run(clients, MEAN_CHAIN, 5, 0.05)
    assert loss.loss(plain[-1]) > 10 * loss.loss(plain[0])
    heavy = [*(Client(loss, "a") for _ in range(4)), Client(liar, "b", examples=6.0)]
    clipped = run(heavy, CLIPPED, 5, 0.05)
    assert loss.loss(clipped[-1]) > loss.loss(clipped[0])


def test_9_the_clip_costs_no_more_than_what_it_cuts_off_and_rests_where_nobody_can_gain_for_all():
    losses = [Quadratic(i, scale=3.0 if i == 0 else 1.0) for i in range(5)]
    matrix = np.mean([f.matrix for f in losses], axis=0)
    gamma, rounds = 1 / np.linalg.eigvalsh(matrix)[-1], 800
    visited = run(one_each(losses), CLIPPED, rounds, gamma)
    squares, cuts = [], []
    for x in visited[:-1]:
        gradients = np.array([f.gradient(x) for f in losses])
        lengths = np.linalg.norm(gradients, axis=1)
        squares.append(np.sum(gradients.mean(axis=0) ** 2))
        cuts.append(np.mean(np.maximum(lengths - lower_median(lengths), 0)))
    best = np.mean([f.loss(minimiser(losses)) for f in losses])
    first = 2 * (np.mean([f.loss(visited[0]) for f in losses]) - best) / (gamma * rounds)
    assert first < np.mean(squares) <= first + max(cuts) ** 2
    end = visited[-1]
    assert np.linalg.norm(end - visited[-2]) < 1e-9
    assert 0.3 * cuts[-1] < np.sqrt(squares[-1]) <= cuts[-1]
    before = np.array([f.loss(end) for f in losses])
    rng = np.random.default_rng(0)
    for _ in range(500):
        step = 1e-3 * rng.normal(size=SIZE)
        assert max(np.array([f.loss(end + step) for f in losses]) - before) > 0


def test_9_clients_that_agree_on_the_minimiser_reach_it_however_their_lengths_differ():
    losses = [Quadratic(i, scale=scale) for i, scale in enumerate((0.2, 1.0, 1.0, 5.0, 50.0))]
    for loss in losses:
        loss.centre = losses[0].centre
    smooth = max(np.linalg.eigvalsh(loss.matrix)[-1] for loss in losses)
    visited = run(one_each(losses), CLIPPED, 4000, 1 / smooth)
    terms, cut = [], 0
    for x in visited[:-1]:
        squares = np.array([np.sum(loss.gradient(x) ** 2) for loss in losses])
        shares = np.minimum(1, lower_median(np.sqrt(squares)) / np.sqrt(squares))
        terms.append(np.mean(shares * squares))
        cut += int(shares.min() < 0.1)
    assert cut > 1000  # the loudest is shortened a lot, all the way
    away = [np.sum((x - losses[0].centre) ** 2) for x in visited]
    for rounds in (10, 100, 1000, 4000):
        assert np.mean(terms[:rounds]) <= away[0] * smooth**2 / rounds
    assert all(then < now for now, then in itertools.pairwise(away))
    assert away[-1] < 1e-6 * away[0]


@pytest.mark.parametrize("distance", [20.0, 2000.0])
def test_9_clients_that_want_different_points_rest_at_hubers_estimate(distance):
    """The last client is far off; the plain mean follows it, the clipped one hardly."""
    smooth, rng = 2.0, np.random.default_rng(4)
    centres = [*rng.normal(size=(4, SIZE)), np.full(SIZE, distance)]
    losses = [Bowl(centre, smooth) for centre in centres]
    visited = run(one_each(losses), CLIPPED, 1500, 1 / smooth)
    end = visited[-1]
    assert np.linalg.norm(end - visited[-2]) < 1e-9
    c = lower_median([np.linalg.norm(loss.gradient(end)) for loss in losses])

    def huber(x):
        lengths = np.array([np.linalg.norm(loss.gradient(x)) for loss in losses])
        return np.mean(np.where(lengths <= c, lengths**2 / 2, c * lengths - c**2 / 2))

    for _ in range(300):
        assert huber(end + 1e-2 * rng.normal(size=SIZE)) > huber(end)
    right = np.mean(centres[:4], axis=0)
    assert np.linalg.norm(end - right) < 3
    plain = run(one_each(losses), MEAN_CHAIN, 50, 1 / smooth)[-1]
    np.testing.assert_allclose(plain, np.mean(centres, axis=0), atol=1e-6)
    assert np.linalg.norm(plain - right) > 0.15 * distance


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_9_nothing_is_cut_where_all_updates_are_equally_long(length):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sent = rng.normal(size=(5, SIZE))
        sent *= length / np.linalg.norm(sent, axis=1, keepdims=True)
        losses = [Bowl(-one) for one in sent]  # whose gradients at zero they are
        steps = [run(one_each(losses), spec, 1, 1.0)[1] for spec in (CLIPPED, MEAN_CHAIN)]
        np.testing.assert_allclose(steps[0], steps[1], atol=1e-12)


def alike(clip, clients_per_type, rounds=20):
    """Least cosine over rounds of PCGrad's and CAGrad's direction with the mean's, of two types."""
    rng = np.random.default_rng(0)
    first = [DEFAULT_CHAIN[0]] if clip else []
    mean, equal = {"transform": "within_type_mean"}, {"transform": "combine", "weights": "equal"}
    chains = [
        build_chain([*first, mean, *rest])
        for rest in ([equal], [{"transform": "pcgrad"}, equal], [{"transform": "cagrad"}])
    ]
    least = 1.0
    for _ in range(rounds):
        sent = rng.exponential(size=(2 * clients_per_type, 1)) * rng.normal(
            size=(2 * clients_per_type, SIZE)
        )
        members = [Member(f"c{i}", f"t{i % 2}", vector, 1.0) for i, vector in enumerate(sent)]
        found = [c.update(make_updates(members), c.init())[0].direction for c in chains]
        units = [one / np.linalg.norm(one) for one in found]
        least = min(least, units[0] @ units[1], units[0] @ units[2])
    return least


def test_10_two_updates_have_one_direction_where_they_are_equally_long_and_the_clip_makes_them_so():
    assert alike(clip=True, clients_per_type=1) > 1 - 1e-6
    assert alike(clip=False, clients_per_type=1) < 0.99
    assert alike(clip=True, clients_per_type=4) < 0.999
