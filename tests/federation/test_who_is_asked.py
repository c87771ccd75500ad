"""Clients describe themselves once for all strategies, and again where what they say may differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import events

from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session
from heterotune_flwr.schema import MethodConfig


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"learning_rate": 0.5, "local_steps": 99, "proximal": 0.1}, 1),
        ({"slots": "last-1"}, 2),
        ({"batch_size": 2}, 2),  # a node's owner may take no part in steps on so few
        ({"clip_norm": 5.0}, 2),
        ({"losses": {"entropy": {}}}, 2),
    ],
)
def test_a_strategy_with_other_settings_asks_again_where_a_node_may_answer_otherwise(
    tmp_path: Path, changes: dict[str, object], asked: int
) -> None:
    config = toy_config(tmp_path, (2, 1))
    session = Session(
        ToyFederation(config).grid(), config, Journal(Path(str(config.run.dir))), "toy-0"
    )
    for train in (config.train, config.train, replace(config.train, **changes)):  # type: ignore[arg-type]
        assert len(session.roster(MethodConfig(), train, 0).clients) == 3
    assert len(events(config, "describe")) == asked
