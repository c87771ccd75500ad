"""Synthetic federations for the tests of docs/theory.md: losses, clients with noise, and many rounds of a chain."""

from __future__ import annotations

import numpy as np

from heterotune_flwr.cmga import Member, build_chain, make_updates

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
        """Through this type's (perhaps rotated) basis."""
        away = self.turn @ x - self.centre
        return 0.5 * away @ self.matrix @ away

    def gradient(self, x):
        return self.turn.T @ self.matrix @ (self.turn @ x - self.centre)


class Bowl:
    """f(x) = L/2 |x - centre|^2."""

    def __init__(self, centre, smooth=1.0):
        self.centre, self.smooth = np.asarray(centre), smooth

    def gradient(self, x):
        return self.smooth * (x - self.centre)


class Valleys:
    """f(x) = sum(1 - cos(x - centre)) of many numbers: gradients are 1-Lipschitz, and it is not convex."""

    def __init__(self, seed):
        self.centre = np.random.default_rng(seed).uniform(-1, 1, size=SIZE)

    def loss(self, x):
        return np.sum(1 - np.cos(x - self.centre))

    def gradient(self, x):
        return np.sin(x - self.centre)


class Client:
    """A loss, its type, its examples, and the noise of its gradients (whose variance is ``sigma ** 2``)."""

    def __init__(self, loss, type_key, examples=1.0, sigma=0.0):
        self.loss, self.type_key, self.examples, self.sigma = loss, type_key, examples, sigma

    def pseudo_gradient(self, x, steps, rate, rng):
        """-Delta / (H eta) of H steps; the noise is drawn once, as what their mean has of it."""
        noise = self.sigma / np.sqrt(x.size) * rng.normal(size=x.size)
        y = x
        for _ in range(steps):
            y = y - rate * (self.loss.gradient(y) + noise)
        return (x - y) / (steps * rate)


def run(clients, spec, rounds, gamma, steps=1, rate=1e-3, start=None, seed=0):
    """Points visited; the chain combines descent directions as it does deltas."""
    chain = build_chain(spec)
    x = np.zeros(clients[0].loss.centre.size) if start is None else start
    rng = np.random.default_rng(seed)
    state, visited = chain.init(), [x]
    for index in range(rounds):
        members = [
            Member(f"c{i}", c.type_key, -c.pseudo_gradient(x, steps, rate, rng), c.examples)
            for i, c in enumerate(clients)
        ]
        result, state = chain.update(make_updates(members, index + 1), state)
        x = x + gamma * result.direction
        visited.append(x)
    return visited


def one_each(losses, sigma=0.0):
    """One client of each type."""
    return [Client(loss, f"t{i}", sigma=sigma) for i, loss in enumerate(losses)]


def minimiser(losses):
    return np.linalg.solve(sum(f.matrix for f in losses), sum(f.matrix @ f.centre for f in losses))


def mean_loss(losses, x):
    return np.mean([f.loss(x) for f in losses])
