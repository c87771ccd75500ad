"""Strategies of one's own, and what is wrong with them, named before any work or where it happens."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import HERE, SPECS, config_dir, start

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.strategies import HeteroTune, build_strategy
from heterotune_flwr.strategies.build import check_strategies


def strategy_x(tmp_path, kind):
    """A strategy of a class of one's own, called x, before it starts."""
    config = toy_config(tmp_path)
    session = Session(ToyFederation(config).grid(), config, Journal(config_dir(config)))
    return kind(StrategyContext("x", config, 0, session))


def test_a_step_that_is_not_finite_is_not_applied(tmp_path):
    class Careless(HeteroTune):
        def combine(self, group, round, updates):
            return {name: value * np.nan for name, value in updates[0].deltas.items()}

    strategy = strategy_x(tmp_path, Careless)
    with pytest.raises(FederationError, match="not finite"):
        strategy.start(strategy.context.session.grid)
    assert all(np.isfinite(value).all() for value in strategy.shared_tensors().values())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda deltas: None, "a NoneType, not arrays"),
        (lambda deltas: {"nonsense": np.zeros(1)}, "'nonsense', which is no tensor of the group"),
        (lambda deltas: dict.fromkeys(deltas, 1.0), "as float, an array"),
        (lambda deltas: {n: v[None] for n, v in deltas.items()}, r"as \[1, .*an array \["),
    ],
)
def test_a_step_that_fits_nothing_is_named_and_not_applied(tmp_path, made, message):
    class Careless(HeteroTune):
        def combine(self, group, round, updates):
            return made(updates[0].deltas)

    strategy = strategy_x(tmp_path, Careless)
    with pytest.raises(FederationError, match=f"strategy x, round 1: combine returned.*{message}"):
        strategy.start(strategy.context.session.grid)


def test_an_unknown_scope_is_refused(tmp_path):
    class Careless(HeteroTune):
        def scope(self, name, type_key):
            return "everyone"

    strategy = strategy_x(tmp_path, Careless)
    with pytest.raises(ConfigError, match=r"'everyone'; one of global, type, client, fixed"):
        strategy.start(strategy.context.session.grid)


class Broken(HeteroTune):
    """A user's strategy with an error in it."""

    def combine(self, group, round, updates):
        raise KeyError("my own mistake")


def test_an_error_in_ones_own_class_says_where_it_came_from(tmp_path, capsys):
    config = toy_config(tmp_path, strategies={"mine": {"_component_": f"{__name__}.Broken"}})
    config.run.compare = ["mine"]
    grid = ToyFederation(config).grid()
    message = r"strategy mine \(seed 0\) failed with KeyError: 'my own mistake'; flower.log"
    with pytest.raises(FederationError, match=message):
        run_strategies(grid, config, Journal(config_dir(config)), "toy")
    assert 'raise KeyError("my own mistake")' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**SPECS["heterotune"], "chain": [{"transform": "nonsense"}]}, "nonsense"),
        (
            {**SPECS["heterotune"], "train": {"local_steps": 0}},
            "strategies.mine.train.local_steps",
        ),
        ({**SPECS["heterotune"], "method": {"gate": "denze"}}, "did you mean 'dense'"),
        ({**SPECS["heterotune"], "foo": 3}, "no key 'foo'"),
    ],
)
def test_wrong_options_of_any_compared_strategy_are_found_before_the_first_runs(
    tmp_path, spec, message
):
    config = toy_config(tmp_path)
    config.strategies = {"heterotune": SPECS["heterotune"], "mine": spec}
    config.run.compare = ["heterotune", "mine"]
    with pytest.raises(ConfigError, match=message):
        check_strategies(config)


def test_own_strategy_overrides_one_method(tmp_path):
    config = toy_config(tmp_path)
    config.method.gate_scope = "type"
    strategy, log = start(config, name="mine", spec={"_component_": f"{__name__}.Median"})
    assert isinstance(strategy, Median)
    assert strategy.groups_seen == {"global", *(f"type/{k}" for k in strategy.roster.type_keys)}
    assert [e["clients"] for e in log if e["event"] == "round"] == [6, 6, 6]


class Median(HeteroTune):
    """A user's strategy: coordinate-wise median instead of CMGA."""

    def __init__(self, context):
        super().__init__(context)
        self.groups_seen = set()

    def combine(self, group, round, updates):
        self.groups_seen.add(group)
        return {
            name: np.median([update.deltas[name] for update in updates], axis=0).astype(np.float32)
            for name in updates[0].deltas
        }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "lacks _component_"),
        ({"_component_": "heterotune_flwr.strategies.Nope"}, "_component_ is"),
        ({"_component_": "no_such_module.Thing"}, "No module named"),
        ({"_component_": "heterotune_flwr.errors.ConfigError"}, "which is no HeteroStrategy"),
        ({**SPECS["heterotune"], "chian": []}, "did you mean 'chain'"),
        ({**SPECS["heterotune"], "method": {"latnt": 3}}, "did you mean 'latent'"),
        ({**SPECS["heterotune"], "method": {"latent": "x"}}, "a whole number of at least 1"),
        ({**SPECS["heterotune"], "train": {"batch_sise": 3}}, "did you mean 'batch_size'"),
        ({"_component_": f"{HERE}.FedIT"}, "method.kind=lora"),
    ],
)
def test_wrong_strategy_entries_get_one_clear_line(tmp_path, spec, message):
    config = toy_config(tmp_path)
    session = Session(ToyFederation(config).grid(), config, Journal(config_dir(config)))
    with pytest.raises(ConfigError, match=message):
        build_strategy(spec, StrategyContext("x", config, 0, session))
