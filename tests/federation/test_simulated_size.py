"""A simulation with another number of nodes than the run has clients."""

from __future__ import annotations

import time

import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import session, simulated
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal

STRATEGY = {"heterotune": {"_component_": "heterotune_flwr.strategies.heterotune.HeteroTune"}}


@pytest.fixture(autouse=True)
def simulation(monkeypatch):
    monkeypatch.setattr(session, "is_simulation", lambda grid: True)
    monkeypatch.setattr(simulated, "ALL_MADE_SECONDS", 0.3)


def grid_of(config, nodes):
    app = ToyFederation(config).app()
    return InProcessGrid(app, [{"partition-id": i, "num-partitions": 3} for i in range(nodes)])


@pytest.mark.parametrize("nodes", [2, 4])
def test_the_number_that_is_needed_is_said_at_once(tmp_path, nodes):
    config = toy_config(tmp_path, (2, 1, 0), STRATEGY, wait_seconds=300.0)
    began = time.monotonic()
    with pytest.raises(FederationError, match=rf"has {nodes} nodes.*num-supernodes=3"):
        run_strategies(grid_of(config, nodes), config, Journal(tmp_path / "run"), "toy-0")
    assert time.monotonic() - began < 30


def test_nodes_that_are_still_being_made_are_waited_for(tmp_path, monkeypatch):
    config = toy_config(tmp_path, (2, 1, 0), STRATEGY)
    grid = grid_of(config, 3)
    every, begun = list(grid.get_node_ids()), time.monotonic()
    monkeypatch.setattr(
        grid, "get_node_ids", lambda: every[: int((time.monotonic() - begun) / 0.2)]
    )
    results = run_strategies(grid, config, Journal(tmp_path / "run"), "toy-0")
    assert len(results["runs"][0]["clients"]) == 3
