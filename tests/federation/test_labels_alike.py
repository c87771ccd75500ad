"""Labels that share their first tokens, as a user brings them: a CSV, three models, all that crosses types."""

from __future__ import annotations

import csv
from collections import Counter

import pytest
from toy_runs import events

from client_app.app import app
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import global_test, training_pool
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.strategies import build_strategy

#: What sections are called here.
NAMES = {
    "python": "code python",
    "perl": "code perl",
    "sound": "media sound",
    "games": "media games",
    "fonts": "media",
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "packages.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        found = [e for e in training_pool(DataConfig()) if e.label in NAMES][:1000]
        rows.writerows([e.text, NAMES[e.label]] for e in found)
    return path


@pytest.mark.slow
def test_all_types_learn_labels_that_share_their_first_tokens(table, tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    words = (
        f"data.train={table} data.examples_per_client=60 data.global_test_examples=150 run.dir={tmp_path / 'run'} "
        "strategies.heterotune.predictions.anchors=100 strategies.heterotune.personalization_phase=0.5 "
        "train.learning_rate=0.01 server.rounds=4 server.evaluate_every=0 train.local_steps=15"
    )
    config = compose("quick", words)
    assert any("media sound" in line for line in preflight(config))
    nodes = [{"partition-id": n, "num-partitions": 6} for n in range(6)]
    grid = InProcessGrid(app, nodes, {"config": "quick", "overrides": words})
    journal = Journal(tmp_path / "run")
    session = Session(grid, config, journal, "alike-0")
    context = StrategyContext("heterotune", config, 0, session)
    strategy = build_strategy(config.strategies["heterotune"], context)
    strategy.start(session.grid)
    common = Counter(example.label for example in global_test(config.data)).most_common(1)[0][1]
    accuracies = [row.global_accuracy or 0.0 for row in strategy.outcome.rows]
    assert len(set(accuracies)) == 3  # one bank per type, after the phase
    assert min(accuracies) > common / 150 + 0.2
    at_work = [set(event["channels"]) for event in events(config, "round")]
    assert set.union(*at_work) == {"statistics", "predictions"}
