"""Guests beside what has its own idea of a client: control variates, a federation that is waiting, short memory."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import events, start

from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import roster
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal

COMPONENT = "heterotune_flwr.strategies"


def test_scaffolds_control_variate_is_that_of_the_clients_that_train(tmp_path):
    """A third client of the type is a guest: c is a mean over two."""
    config = toy_config(tmp_path, (3, 1, 1), rounds=2)
    config.exchange.codec = "fp32"
    federation = ToyFederation(config)
    federation.examples_of = lambda partition: 0 if partition == 4 else 48
    sgd = {"optimizer": "sgd", "learning_rate": 0.01}
    spec = {"_component_": f"{COMPONENT}.Scaffold", "train": sgd}
    strategy, _ = start(config, federation, spec=spec)
    ids = [c for c in strategy.roster.of_type("small@fp32") if c in strategy.roster.learners]
    assert len(ids) == 2
    name = "slots.0.experts.global.0.down.weight"
    deltas = [
        federation.answered[cid, 1][name] - federation.received[cid, 1].tensors[name] for cid in ids
    ]
    expected = -np.mean(deltas, axis=0) / (config.train.local_steps * 0.01)
    found = federation.received[ids[0], 2].channels["control_variates"].tensors[name]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


class Filling(InProcessGrid):
    """Nodes come one after the other: one more every time somebody asks who is there."""

    there = 0

    def get_node_ids(self):
        self.there = min(self.there + 1, len(self.contexts))
        return list(self.contexts)[: self.there]


def filling(tmp_path, guests, wait):
    """A federation of one client per type that starts as soon as it may; the first ``guests`` own no examples."""
    spec = {"_component_": f"{COMPONENT}.HeteroTune"}
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": spec}, min_clients=1, wait_seconds=wait)
    toy = ToyFederation(config)
    toy.examples_of = lambda partition: 0 if partition < guests else 48
    grid = Filling(toy.app(), [{"partition-id": i, "num-partitions": 3} for i in range(3)])
    return grid, config, Journal(tmp_path / "run")


def test_a_federation_waits_for_somebody_who_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "AGAIN_SECONDS", 0.05)
    grid, config, journal = filling(tmp_path, guests=2, wait=60.0)
    run_strategies(grid, config, journal, "toy-0")
    (told,) = events(config, "describe")
    assert told["clients"] == 3


def test_it_waits_no_longer_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "AGAIN_SECONDS", 0.05)
    grid, config, journal = filling(tmp_path, guests=3, wait=0.5)
    with pytest.raises(FederationError, match="every client is a guest"):
        run_strategies(grid, config, journal, "toy-0")
