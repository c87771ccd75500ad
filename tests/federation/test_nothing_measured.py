"""A run of which nothing was measured in the end is no finished run."""

from __future__ import annotations

import dataclasses

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import config_dir

from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.flower import Message
from heterotune_flwr.protocol.messages import EvaluateReply


def test_a_run_of_which_nothing_was_evaluated_fails(tmp_path):
    spec = {"_component_": "heterotune_flwr.strategies.HeteroTune"}
    config = toy_config(tmp_path, (2, 1, 1), {"heterotune": spec}, rounds=2)
    config.run.compare = ["heterotune"]
    federation = ToyFederation(config)
    evaluate = federation.evaluate

    def without_a_test(message, context):
        answer = evaluate(message, context)
        reply = dataclasses.replace(EvaluateReply.from_content(answer.content), metrics={})
        return Message(reply.to_content(), reply_to=message)

    federation.evaluate = without_a_test
    journal = Journal(config_dir(config))
    with pytest.raises(FederationError, match="nothing was evaluated"):
        run_strategies(federation.grid(), config, journal, "toy-0")
    federation.evaluate = evaluate
    federation.lose_evaluation = {(f"client-{n:04d}", round) for n in range(4) for round in (2, 3)}
    config.server.rounds = 3
    with pytest.raises(FederationError, match=r"client-\d+: .*disk"):
        run_strategies(federation.grid(), config, journal, "toy-0", True)
    with pytest.raises(FederationError, match="nothing was evaluated"):  # nor is it one later
        run_strategies(federation.grid(), config, journal, "toy-0", True)
