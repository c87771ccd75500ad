"""The server's side of what clients take home: who is asked when, and what results and journal say."""

from __future__ import annotations

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import SPECS, events, start

from heterotune_flwr.federation.kept import Kept


def test_every_tested_client_is_asked_once_after_the_last_round_and_told_of(tmp_path):
    config = toy_config(tmp_path, evaluate_every=1)
    strategy, _ = start(config)
    told = events(config, "took_home")
    clients = sorted(strategy.roster.clients)
    assert [(event["client_id"], event["round"]) for event in told] == [(c, 3) for c in clients]
    assert [event["took"] for event in told] == ["federated", "bare"] * (len(clients) // 2)
    first, second = told[:2]
    assert first["choosing"] == {"examples": 20, "bare": {"loss": 1.5}}
    assert second["taken"] == second["bare"] == {"personal_accuracy": 0.25}
    row = next(row for row in strategy.outcome.rows if row.client_id == second["client_id"])
    assert row.to_json()["kept"]["federated"]["personal_accuracy"] == row.personal_accuracy
    kept = strategy.outcome.to_json()["kept"]
    half = len(clients) // 2
    assert (kept["clients"], kept["took"]) == (
        len(clients),
        {"bare": half, "alone": 0, "federated": half},
    )
    mine = [row.personal_accuracy for row in strategy.outcome.rows]
    assert kept["own_tests"]["federated"]["accuracy"] == pytest.approx(sum(mine) / len(mine))
    assert kept["own_tests"]["taken"]["accuracy"] == pytest.approx(
        (sum(mine[::2]) + 0.25 * half) / len(mine)
    )
    assert "alone" not in kept["own_tests"]
    assert [e["round"] for e in events(config, "evaluate") if "kept" in e] == [3]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_federated_model_is_told_as_it_could_be_taken_home(reverse):
    told = {"personal_loss": 1.9, "federated_personal_loss": 1.0, "bare_personal_loss": 1.2,
            "federated_choosing_loss": 1.1, "federated_choosing_own_rounds": 2.0,
            "choosing_examples": 20.0}  # fmt: skip
    kept = Kept.of("federated", dict(sorted(told.items(), reverse=reverse)))
    assert kept.tests == {"federated": {"personal_loss": 1.0}, "bare": {"personal_loss": 1.2}}
    assert kept.choosing == {"examples": 20, "federated": {"loss": 1.1, "own_rounds": 2.0}}


def test_it_is_a_setting(tmp_path):
    config = toy_config(tmp_path, take_home=False)
    strategy, _ = start(config)
    assert events(config, "took_home") == []
    assert strategy.outcome.to_json()["kept"] == {}


@pytest.mark.parametrize("said", [{"took": "pooled"}, {"alone_global_loss": -1.0}])
def test_what_no_client_can_say_is_refused(tmp_path, monkeypatch, said):
    config = toy_config(tmp_path)
    federation = ToyFederation(config)
    answer = federation.evaluate

    def lying(message, context):
        reply = answer(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content["config"] |= {k: v for k, v in said.items() if k == "took"}
            reply.content["metrics"] |= {k: v for k, v in said.items() if k != "took"}
        return reply

    monkeypatch.setattr(federation, "evaluate", lying)
    start(config, federation, spec=SPECS["heterotune"])
    told = [event["client_id"] for event in events(config, "took_home")]
    assert told
    assert "client-0001" not in told
