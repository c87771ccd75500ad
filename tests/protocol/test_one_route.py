"""A setting reaches a client by one route: the strategy's whole training settings, in every message's header."""

from __future__ import annotations

import dataclasses

import pytest
from real_clients import run
from toy_federation import ToyFederation, toy_config
from toy_runs import start

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.strategies.build import strategy_config

OWN = {
    "batch_size": 7,
    "clip_norm": 0.5,
    "slots": "last-1",
    "logit_adjustment": 0.25,
    "last_rate": 0.5,
}


def test_every_training_setting_may_differ_per_strategy_and_travels(tmp_path):
    config = toy_config(tmp_path, rounds=2)
    federation = ToyFederation(config)
    start(
        config,
        federation,
        spec={"_component_": "heterotune_flwr.strategies.WithinType", "train": OWN},
    )
    for round, share in ((1, 1.0), (2, 0.5)):
        wanted = dataclasses.replace(
            config.train, **OWN, learning_rate=share * config.train.learning_rate
        )
        assert federation.received["client-0000", round].header.train == wanted


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(TrainConfig)])
def test_no_key_is_left_out(key, tmp_path):
    config = toy_config(tmp_path)
    value = getattr(config.train, key)
    assert strategy_config("x", {"train": {key: value}}, config).train == config.train


def test_a_key_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="batchsize"):
        strategy_config("x", {"train": {"batchsize": 3}}, toy_config(tmp_path))


def test_clients_work_by_the_strategys_settings(world):
    """Of three depth slots the last alone is trained, in one strategy of the run."""
    slots = "method.slots=3 strategies.within_type.train.slots=last-1"
    strategy = run(world, "within_type", overrides=slots)
    assert {client.info.lowest_slot for client in strategy.roster.clients.values()} == {2}
