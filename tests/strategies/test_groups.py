"""Who shares what: experts, gates, types that are badly aligned, and what never crosses types."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import SPECS, start

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.build import check_strategy


def test_nothing_crosses_types_in_within_type(tmp_path):
    spec = {
        **SPECS["within_type"],
        "predictions": {"anchors": 12, "pool": 12},
        "statistics": {"weight": 0.2},
    }
    config = toy_config(tmp_path)
    strategy, _ = start(config, name="mine", spec=spec)
    assert {channel.options.pool_over for channel in strategy.channels} == {"type"}
    for section in ("predictions", "statistics"):
        across = {**spec, section: {"pool_over": "all"}}
        with pytest.raises(ConfigError, match=rf"{section}\.pool_over is 'all'"):
            check_strategy("mine", across, config)


def test_gates_of_a_clients_own_stay_on_it(tmp_path):
    config = toy_config(tmp_path)
    config.method = replace(config.method, gate_scope="client")
    federation = ToyFederation(config)
    strategy, _ = start(config, federation)
    shared = {name.split("/", 1)[1] for name in strategy.shared_tensors()}
    assert shared
    assert all(".experts.global." in name for name in shared)
    assert strategy.models_differ
    (*_, (own, _)) = federation.states["toy-0-heterotune-seed0", "client-0003"].values()
    assert own
    assert all(".gate." in name for name in own)
    (*_, (other, _)) = federation.states["toy-0-heterotune-seed0", "client-0000"].values()
    assert any(not np.array_equal(own[name], other[name]) for name in own)


def test_gates_of_a_type_are_averaged_inside_it(tmp_path):
    config = toy_config(tmp_path)
    config.method = replace(config.method, gate_scope="type")
    strategy, _ = start(config)
    assert set(strategy.state) == {
        "global", "type/large@fp32", "type/middle@fp32", "type/small@fp32",
    }  # fmt: skip
    assert all(".experts.global." in name for name in strategy.state["global"])
    name = "slots.0.gate.weight"
    one, other = (strategy.state[f"type/{key}@fp32"][name] for key in ("small", "large"))
    assert not np.array_equal(one, other)


def test_badly_aligned_types_keep_their_experts_to_themselves(tmp_path):
    config = toy_config(tmp_path)
    config.alignment.quality_threshold = 0.99
    strategy, _ = start(config)
    assert "global" not in strategy.state
    # A control, on the other hand, must show the damage it does.
    config.alignment.control = "random_maps"
    strategy, _ = start(config)
    assert "global" in strategy.state
