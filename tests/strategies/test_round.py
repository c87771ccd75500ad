"""Strategies on an in-process federation of clients that speak the real wire contract."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import HERE, SPECS, config_dir, start

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.sampling import sample_clients
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.federation.updates import Work, as_update
from heterotune_flwr.flower import ArrayRecord, ConfigRecord
from heterotune_flwr.protocol.messages import TrainReply
from heterotune_flwr.strategies import build_strategy

MEAN = {
    "_component_": f"{HERE}.HeteroTune",
    "chain": [
        {"transform": "within_type_mean"},
        {"transform": "combine", "weights": "examples"},
    ],
}


def test_all_strategies_learn_and_sharing_across_types_helps_the_weakest(tmp_path):
    config = toy_config(tmp_path, (1, 1, 1), SPECS, rounds=25)
    config.run.seeds = [0, 1]
    results = run_strategies(
        ToyFederation(config).grid(), config, Journal(config_dir(config)), "toy-0"
    )
    mean = {
        name: np.mean(
            [
                run["overall"]["global_accuracy_mean"]
                for run in results["runs"]
                if run["strategy"] == name
            ]
        )
        for name in SPECS
    }
    before = results["runs"][0]["before"]["overall"]["global_accuracy_mean"]
    assert all(value > before + 0.15 for value in mean.values()), mean
    assert mean["heterotune"] > mean["local_only"] + 0.03, mean
    # One client per type: averaging inside a type is training alone, but for bf16 on the way.
    assert mean["within_type"] == pytest.approx(mean["local_only"], abs=0.04)
    saved = json.loads((config_dir(config) / "results.json").read_text())
    assert saved["runs"] == json.loads(json.dumps(results["runs"]))
    assert {path.stem for path in (config_dir(config) / "banks").iterdir()} == {
        f"{name}-seed{seed}" for name in SPECS for seed in (0, 1)
    }


def test_same_seed_same_bank_bit_for_bit_whatever_the_order_of_nodes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, _ = start(toy_config(tmp_path / "a"))
    other, _ = start(toy_config(tmp_path / "b"), reverse=True)
    third, _ = start(toy_config(tmp_path / "b"), seed=1)
    assert one.shared_tensors().keys() == other.shared_tensors().keys()
    for name, value in one.shared_tensors().items():
        np.testing.assert_array_equal(value, other.shared_tensors()[name])
    assert any(
        not np.array_equal(value, third.shared_tensors()[name])
        for name, value in one.shared_tensors().items()
    )
    assert [row.to_json() for row in one.outcome.rows] == [
        row.to_json() for row in other.outcome.rows
    ]


def test_one_round_of_plain_averaging_is_the_weighted_mean_of_what_clients_sent(tmp_path):
    config = toy_config(tmp_path, rounds=1)
    config.exchange.codec = "fp32"
    strategy, _ = start(config, name="mean", spec=MEAN)
    # The oracle: the same clients, asked directly.
    federation = ToyFederation(config)
    session = Session(federation.grid(), config, Journal(tmp_path / "oracle"), "toy-0")
    fresh = build_strategy(MEAN, StrategyContext("mean", config, 0, session))
    fresh.prepare(session.grid)
    name = "slots.0.experts.global.0.up.weight"
    start_value = fresh.state["global"][name].copy()
    messages = fresh.configure_train(1, ArrayRecord(), ConfigRecord(), session.grid)
    replies = session.grid.send_and_receive(list(messages))
    deltas = [TrainReply.from_content(reply.content).deltas[name] for reply in replies]
    assert len(deltas) == 6
    np.testing.assert_allclose(
        strategy.state["global"][name], start_value + np.mean(deltas, axis=0), atol=1e-6
    )


def test_300_clients_take_part(tmp_path):
    config = toy_config(tmp_path, (100, 100, 100), evaluate_clients=300)
    config.train.local_steps = 5
    strategy, log = start(config)
    assert len(strategy.outcome.rows) == 300
    assert [e["clients"] for e in log if e["event"] == "round"] == [300] * 3
    assert strategy.transport.ledger.client_rounds == 900
    after = np.mean([row.global_accuracy for row in strategy.outcome.rows])
    assert after > np.mean([row.global_accuracy for row in strategy.outcome.before]) + 0.05


def test_partial_participation_trains_the_sampled_and_evaluates_everybody(tmp_path):
    config = toy_config(tmp_path, (4, 4, 4), participation=0.25, rounds=4)
    federation = ToyFederation(config)
    start(config, federation)
    trained = {}
    for entry in federation.log:
        if entry[0] == "train":
            trained.setdefault(entry[1], []).append(entry[2])
    everyone = [f"client-{i:04d}" for i in range(12)]
    for number in range(1, 5):
        assert sorted(trained[number]) == sample_clients(everyone, 0.25, 0, number)
        assert len(trained[number]) == 3
    assert len({tuple(clients) for clients in trained.values()}) > 1
    asked = [entry for entry in federation.log if entry[0] == "evaluate" and entry[1] == 4]
    assert len(asked) == 12
    assert sum("global" in scopes for _, _, _, scopes in asked) == 3


def test_sampling_depends_on_seed_and_round_only():
    ids = [f"c{i}" for i in range(20)]
    assert sample_clients(ids, 0.3, 1, 2) == sample_clients(ids[::-1], 0.3, 1, 2)
    assert sample_clients(ids, 0.3, 1, 2) != sample_clients(ids, 0.3, 2, 2)
    assert sample_clients(ids, 0.3, 1, 2) != sample_clients(ids, 0.3, 1, 3)
    assert len(sample_clients(ids, 0.01, 0, 1)) == 1
    assert sample_clients(ids, 1.0, 0, 1) == sorted(ids)
    counts = [cid for r in range(400) for cid in sample_clients(ids, 0.25, 0, r)]
    assert min(counts.count(cid) for cid in ids) > 60  # 100 expected


def test_silent_and_failing_clients_are_named_and_the_round_goes_on(tmp_path):
    config = toy_config(tmp_path, timeout_seconds=0.3)
    federation = ToyFederation(config, fail={("client-0001", 2)})
    dead = sorted(federation.grid().get_node_ids())[0]
    strategy, log = start(
        config, federation, drop=lambda node, kind, round: (node, kind, round) == (dead, "train", 2)
    )
    failed = [e for e in log if e["event"] == "client_failed"]
    reasons = {e["client_id"]: e["reason"] for e in failed}
    assert reasons["client-0001"] == "the disk is full"
    assert "no reply within" in reasons["client-0000"]
    assert [e["clients"] for e in log if e["event"] == "round"] == [6, 4, 6]
    assert all(row.global_accuracy is not None for row in strategy.outcome.rows)


def test_nan_update_is_refused_and_reported_by_client(tmp_path):
    config = toy_config(tmp_path)
    strategy, log = start(config, ToyFederation(config, nan={("client-0002", 1)}))
    (refused,) = [e for e in log if e["event"] == "refused"]
    assert (refused["client_id"], refused["round"]) == ("client-0002", 1)
    assert "not finite" in refused["reason"]
    assert [e["clients"] for e in log if e["event"] == "round"] == [5, 6, 6]
    assert all(np.isfinite(value).all() for value in strategy.shared_tensors().values())


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"learning_rate": 1e-12}, "learning_rate"),
        ({"examples": 1e308}, "more than its 48"),
        ({"steps": 1e9}, "more than its"),
        ({"steps": 0.0}, "above 0"),
    ],
)
def test_work_that_was_not_asked_of_a_client_is_refused(claim, message):
    metrics = {"examples": 48.0, "steps": 5.0, "learning_rate": 0.01} | claim
    reply = TrainReply("client-0000", "a", 1, "", {}, metrics)
    with pytest.raises(FederationError, match=message):
        as_update(reply, "a", Work(examples=48, steps=5, learning_rate=0.01))
    honest = replace(
        reply, metrics={**metrics, "examples": 48.0, "steps": 5.0, "learning_rate": 0.01}
    )
    assert as_update(honest, "a", Work(48, 5, 0.01)).examples == 48


@pytest.mark.parametrize(
    ("steps", "warmup", "length"),
    [(5, 0.0, 5.0), (5, 0.2, 5.0), (5, 0.8, 3.5), (5, 1.0, 3.0), (4, 0.5, 3.5), (1, 1.0, 1.0), (0.3, 0.0, 1.0)],
)  # fmt: skip
def test_the_path_of_an_update_is_the_sum_of_its_rates(steps, warmup, length):
    metrics = {"examples": 48.0, "steps": steps, "learning_rate": 0.01}
    asked = Work(48, 5, 0.01, warmup_ratio=warmup)
    found = as_update(TrainReply("client-0000", "a", 1, "", {}, metrics), "a", asked)
    assert found.path_length == pytest.approx(0.01 * length)


def test_a_lost_last_evaluation_does_not_show_an_older_one(tmp_path):
    config = toy_config(tmp_path)
    everybody = {f"client-{i:04d}" for i in range(6)}
    federation = ToyFederation(config, lose_evaluation={(c, 3) for c in everybody})
    strategy, log = start(config, federation)
    assert strategy.outcome.before
    assert not strategy.outcome.rows
    assert [e["round"] for e in log if e["event"] == "evaluate"][-1] < 3


def test_a_metric_cannot_take_the_place_of_a_field_of_the_journal(tmp_path):
    config = toy_config(tmp_path)
    _, log = start(config, ToyFederation(config, extra_metrics={"round": 99.0, "type": 1.0}))
    assert {e["round"] for e in log if e["event"] == "train_reply"} == {1, 2, 3}


def test_a_run_without_any_usable_update_fails_with_the_first_reason(tmp_path):
    config = toy_config(tmp_path, rounds=5)
    every = {(f"client-{i:04d}", r) for i in range(6) for r in range(1, 6)}
    with pytest.raises(FederationError, match="client-0000: the disk is full"):
        start(config, ToyFederation(config, fail=every))


def test_maps_travel_once_and_again_to_a_client_that_lost_them(tmp_path):
    config = toy_config(tmp_path)
    federation = ToyFederation(config, forget={("client-0004", 2)})
    strategy, log = start(config, federation)
    # Everybody got the maps with the evaluation of round 0: no training message carries them ...
    with_maps = [(e[1], e[2]) for e in federation.log if e[0] == "train" and e[3]]
    assert with_maps == [(2, "client-0004")]  # ... but for the one that had lost them
    assert [e["clients"] for e in log if e["event"] == "round"] == [6, 6, 6]
    assert not [e for e in log if e["event"] == "client_failed"]
    assert strategy.transport.ledger.client_rounds == 18


def test_bytes_per_client_round_are_the_bank_in_bf16_plus_little(tmp_path):
    config = toy_config(tmp_path)
    strategy, _ = start(config)
    numbers = sum(value.size for value in strategy.groups.slice("small@fp32").values())
    summary = strategy.outcome.bytes
    assert 2 * numbers < summary["up_per_client_round"] < 2 * numbers + 1500
    assert 2 * numbers < summary["down_per_client_round"] < 2 * numbers + 2500
    assert summary["one_time_up"] > 3 * 2 * 300 * 16  # three types' anchor scores
    assert summary["lora16_bytes"] == 500
    assert summary["model_bytes"] == 2000
    local, _ = start(config, name="local_only")
    assert local.outcome.bytes["up_per_client_round"] < 500


def test_global_test_is_asked_of_one_client_per_type_unless_models_differ(tmp_path):
    config = toy_config(tmp_path)
    for name, expected in (("heterotune", 3), ("local_only", 6)):
        federation = ToyFederation(config)
        strategy, _ = start(config, federation, name=name)
        asked = {
            number: [
                e for e in federation.log if e[:2] == ("evaluate", number) and "global" in e[3]
            ]
            for number in (0, 3)
        }
        assert len(asked[0]) == 3
        assert len(asked[3]) == expected
        assert strategy.models_differ == (name == "local_only")
        assert all(row.global_accuracy is not None for row in strategy.outcome.rows)
        assert all(row.personal_accuracy is not None for row in strategy.outcome.rows)


def test_another_client_speaks_for_its_type_when_the_first_cannot(tmp_path):
    config = toy_config(tmp_path)
    federation = ToyFederation(config, fail_global_test={"client-0000"})
    strategy, _ = start(config, federation)
    assert all(row.global_accuracy is not None for row in strategy.outcome.rows)
    speakers = [e[2] for e in federation.log if e[:2] == ("evaluate", 3) and "global" in e[3]]
    assert sorted(speakers) == ["client-0000", "client-0001", "client-0002", "client-0003"]


def test_cmga_is_journalled_every_round(tmp_path):
    config = toy_config(tmp_path)
    _, log = start(config)
    for event in (e for e in log if e["event"] == "round"):
        slot = event["cmga"]["slot 0"]
        assert set(slot["norms"]) == {"large@fp32", "middle@fp32", "small@fp32"}
        assert len(slot["cosine_before"]) == 3
        assert set(slot["agreement"]) == set(slot["norms"])
        assert all(-1 <= value <= 1 for value in slot["agreement"].values())
        assert sum(slot["weights"].values()) == pytest.approx(1.0)


def test_a_rule_about_directions_journals_conflicts_too(tmp_path):
    config = toy_config(tmp_path)
    chain = [{"transform": "clip_to_median"}, {"transform": "pcgrad"}, *MEAN["chain"]]
    _, log = start(config, spec={**MEAN, "chain": chain})
    for event in (e for e in log if e["event"] == "round"):
        slot = event["cmga"]["slot 0"]
        assert 0 <= slot["conflict_rate"] <= 1
        assert 0 <= slot["clipped"] < event["clients"]
        assert max(slot["norms"].values()) <= slot["clip_length"] * (1 + 1e-6)


def test_too_many_slots_and_too_few_clients(tmp_path):
    config = toy_config(tmp_path)
    config.method = replace(config.method, slots=3)
    with pytest.raises(ConfigError, match=r"set method.slots to at most 2"):
        start(config)
    config = toy_config(tmp_path, min_clients=7, wait_seconds=0.2)
    with pytest.raises(FederationError, match=r"only 6 of 7 clients appeared"):
        start(config)


def test_alignment_asks_another_client_when_the_first_cannot(tmp_path):
    config = toy_config(tmp_path)
    federation = ToyFederation(config, fail={("client-0000", 0)})
    strategy, log = start(config, federation)
    asked = [entry[1] for entry in federation.log if entry[0] == "align"]
    assert sorted(asked) == [f"client-000{n}" for n in range(6)]
    told = {e["type"]: e["reason"] for e in log if e["event"] in ("unchecked", "factors_refused")}
    assert told == {"small@fp32": "aligned by one client, client-0003: unchecked"}
    assert len([e for e in log if e["event"] == "align"]) == 1
    assert len(strategy.maps.digests) == 3


def test_final_bank_file_holds_the_shared_tensors(tmp_path):
    specs = {"heterotune": SPECS["heterotune"]}
    config = toy_config(tmp_path, strategies=specs)
    run_strategies(ToyFederation(config).grid(), config, Journal(config_dir(config)), "toy-0")
    tensors = load_tensors(config_dir(config) / "banks" / "heterotune-seed0.safetensors")
    assert "global/slots.0.experts.global.1.up.weight" in tensors
    assert all(np.abs(value).sum() > 0 for value in tensors.values())
