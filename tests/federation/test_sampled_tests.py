"""A fixed sample of very many clients is tested: drawn by the seed, from every type, the same at a resume."""

from __future__ import annotations

import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.config.choices import check_choices
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.sampling import draw_tested
from heterotune_flwr.reporting.tables import final_table

TYPES = {"a": [f"a{i}" for i in range(30)], "b": [f"b{i}" for i in range(300)], "c": ["c0"]}


@pytest.mark.parametrize(
    ("wanted", "counts"),
    [(None, (4, 44, 1)), (10, (1, 9, 1)), (0.1, (3, 30, 1)), (1, (1, 1, 1)), (1e9, (30, 300, 1))],
)
def test_who_is_tested_is_drawn_once_by_the_seed_from_every_type(wanted, counts):
    chosen = draw_tested(TYPES, wanted, 3)
    assert chosen == sorted(set(chosen))
    assert tuple(sum(c in members for c in chosen) for members in TYPES.values()) == counts
    turned = {key: members[::-1] for key, members in reversed(TYPES.items())}
    assert draw_tested(turned, wanted, 3) == chosen
    if wanted == 10:
        assert draw_tested(TYPES, wanted, 4) != chosen


def test_a_small_federation_is_tested_as_a_whole():
    few = {"a": TYPES["a"], "b": TYPES["b"][:18]}
    assert len(draw_tested(few, None, 0)) == 48


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_number_of_tested_clients_that_makes_no_sense_is_refused(wrong):
    config = compose("demo", "")
    config.server.evaluate_clients = wrong
    with pytest.raises(ConfigError, match="evaluate_clients"):
        check_choices(config)


def sampled(tmp_path, name, rounds=3, resuming=False, **server):
    config = toy_config(
        tmp_path, (5, 5, 5), {"heterotune": {"_component_": HETEROTUNE}},
        rounds=rounds, evaluate_clients=6, evaluate_every=1, keep_checkpoints=2, **server,
    )  # fmt: skip
    return run_strategies(
        ToyFederation(config).grid(), config, Journal(tmp_path / name), "toy", resuming
    )


HETEROTUNE = "heterotune_flwr.strategies.HeteroTune"


def test_a_sampled_test_is_the_same_one_every_time_and_says_so(tmp_path):
    run = sampled(tmp_path, "whole")["runs"][0]
    assert run["population"] == 15
    asked = {
        (event["round"], event["client_id"])
        for event in read_events(tmp_path / "whole" / "rounds.jsonl")
        if event["event"] == "bytes" and event["message_type"] == "evaluate"
    }
    who = sorted(row["client_id"] for row in run["clients"])
    assert len(who) == 6
    assert asked == {(round, client) for round in range(4) for client in who}
    assert [row["client_id"] for row in run["clients_before"]] == who
    assert "mean over 6 clients, a fixed sample of 15" in " ".join(
        final_table({"runs": [run]}, tmp_path, 200).split()
    )
    told = [entry for entry in run["rounds"] if entry["event"] == "evaluate"]
    assert {(entry["tested"], entry["clients"]) for entry in told} == {(6, 15)}
    full = sampled(tmp_path, "all", evaluate_before=False)
    assert full["runs"][0]["clients"] == run["clients"]
    assert full["runs"][0]["clients_before"] == []
    assert [e["round"] for e in full["runs"][0]["rounds"] if e["event"] == "evaluate"] == [1, 2, 3]


def test_a_resumed_run_tests_the_same_sample(tmp_path):
    whole = sampled(tmp_path, "whole")["runs"][0]
    sampled(tmp_path, "parts", rounds=2)
    resumed = sampled(tmp_path, "parts", rounds=3, resuming=True)["runs"][0]
    for key in ("clients", "clients_before", "population"):
        assert resumed[key] == whole[key]
    del resumed["rounds"][4]["kept"]  # clients chose at the end of the shorter run too
    assert resumed["rounds"] == whole["rounds"]
