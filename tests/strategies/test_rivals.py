"""Every rival against its closed form, on clients that speak the real wire contract (toy_federation).

The toy's LoRA has scale 1, so alpha is the rank here.
"""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import toy_config
from toy_runs import HERE, run_rival

from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.strategies.build import check_strategy

LORA = {"kind": "lora", "lora_rank": 4, "lora_alpha": 4.0}
A, B, RESIDUAL = "lora.head.A", "lora.head.B", "lora.head.residual"
SMALL = "type/small@fp32"


def change(tensors):
    """B A."""
    return tensors[B].astype(float) @ tensors[A].astype(float)


def mean_change(federation, ids, round=1):
    """Mean of the clients' B A after a round (all have equally many examples)."""
    answers = [federation.answered[cid, round] for cid in ids]
    requests = [federation.received[cid, round].tensors for cid in ids]
    return np.mean([change({**r, **a}) for r, a in zip(requests, answers, strict=True)], axis=0)


def test_fedit_averages_the_factors_separately(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "FedIT", method=LORA)
    for name in (A, B):
        mean = np.mean([federation.answered[cid, 1][name] for cid in ids], axis=0)
        np.testing.assert_allclose(strategy.state[SMALL][name], mean, rtol=1e-5, atol=1e-7)
    difference = change(strategy.state[SMALL]) - mean_change(federation, ids)
    assert np.abs(difference).max() > 1e-5  # what the others below are for


def test_ffa_lora_never_moves_nor_sends_a_and_averages_exactly(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "FFALoRA", rounds=2, method=LORA)
    for cid in ids:
        for round in (1, 2):
            request = federation.received[cid, round]
            assert set(request.tensors) == {B}
            assert request.expected == [B]
            assert request.frozen == [A]
    shape = strategy.roster.shapes("small@fp32")[A]
    a = initial_tensors({A: shape}, 0)[A]
    mean = np.mean([federation.answered[cid, 2][B] @ a for cid in ids], axis=0)
    np.testing.assert_allclose(strategy.state[SMALL][B] @ a, mean, rtol=1e-4, atol=1e-6)
    assert not strategy.models_differ  # one client can speak for its type


def test_rolora_takes_turns_and_averages_exactly(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "RoLoRA", rounds=2, method=LORA)
    for cid in ids:
        assert federation.received[cid, 1].expected == [B]
        assert federation.received[cid, 2].expected == [A]
        assert federation.received[cid, 2].frozen == [B]
    np.testing.assert_allclose(
        change(strategy.state[SMALL]), mean_change(federation, ids, 2), rtol=1e-4, atol=1e-6
    )


def test_fedex_lora_makes_the_model_the_mean_of_the_models(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "FedExLoRA", rounds=2, method=LORA)
    state = strategy.state[SMALL]
    for name in (A, B):
        mean = np.mean([federation.answered[cid, 2][name] for cid in ids], axis=0)
        np.testing.assert_allclose(state[name], mean, rtol=1e-5, atol=1e-7)
    sent = federation.received[ids[0], 2].tensors[RESIDUAL]
    assert np.abs(sent).max() > 1e-5
    np.testing.assert_allclose(
        change(state) + state[RESIDUAL], sent + mean_change(federation, ids, 2), atol=1e-6
    )
    assert RESIDUAL in federation.received[ids[0], 1].frozen


def test_flora_stacks_any_ranks_and_starts_anew(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "FLoRA", rounds=2, method=LORA, ranks=[2, 4])
    ranks = [federation.received[cid, 1].header.method.lora_rank for cid in ids]
    assert ranks == [2, 4, 2]
    state, first = strategy.state[SMALL], strategy.groups.first_values(SMALL)
    for name in (A, B):
        np.testing.assert_array_equal(state[name], first[name])
    total = sum(mean_change(federation, ids, round) for round in (1, 2))
    np.testing.assert_allclose(state[RESIDUAL], total, atol=1e-6)


def test_flexlora_keeps_the_best_approximation_of_the_mean_change(tmp_path):
    strategy, federation, ids = run_rival(
        tmp_path, "FlexLoRA", rounds=2, clients=(4, 1, 1), method=LORA, ranks=[1, 3]
    )
    assert federation.received[ids[0], 2].tensors[A].shape[0] == 1
    assert federation.received[ids[1], 2].tensors[B].shape[1] == 3
    mean = mean_change(federation, ids, 2)
    left, sizes, right = np.linalg.svd(mean)
    best = (left[:, :3] * sizes[:3]) @ right[:3]
    np.testing.assert_allclose(change(strategy.state[SMALL]), best, atol=1e-6)
    kept = strategy.outgoing(ids[0])
    np.testing.assert_allclose(change(kept), sizes[0] * np.outer(left[:, 0], right[0]), atol=1e-6)
    assert strategy.models_differ


def test_hetlora_pads_with_zeros_and_weighs_by_the_size_of_the_change(tmp_path):
    strategy, federation, ids = run_rival(tmp_path, "HETLoRA", method=LORA, ranks=[1, 2, 4])
    answers = [federation.answered[cid, 1] for cid in ids]
    norms = np.array([np.linalg.norm(change(answer)) for answer in answers])
    expected = np.zeros((4, answers[0][A].shape[1]))
    weights = np.minimum(norms, 1.25 * np.median(norms))  # the largest does not decide alone
    for weight, answer in zip(weights / weights.sum(), answers, strict=True):
        expected[: len(answer[A])] += weight * answer[A]
    np.testing.assert_allclose(strategy.state[SMALL][A], expected, atol=1e-6)


def test_ranks_keep_the_scale_of_every_client_equal(tmp_path):
    method = {**LORA, "lora_alpha": 8.0}
    _, federation, ids = run_rival(tmp_path, "HETLoRA", method=method, ranks=[1, 2, 8])
    scales = set()
    for cid in ids:
        asked = federation.received[cid, 1].header.method
        scales.add(asked.lora_alpha / asked.lora_rank)
    assert scales == {2.0}


def test_scaffold_control_variates(tmp_path):
    sgd = {"optimizer": "sgd", "learning_rate": 0.01}
    _, federation, ids = run_rival(tmp_path, "Scaffold", rounds=2, train=sgd)
    name = "slots.0.experts.global.0.down.weight"
    assert not federation.received[ids[0], 1].channels["control_variates"].tensors[name].any()
    length = 6 * 0.01
    deltas = [
        federation.answered[cid, 1][name] - federation.received[cid, 1].tensors[name] for cid in ids
    ]
    expected = -np.mean(deltas, axis=0) / length  # c_i started at 0
    np.testing.assert_allclose(
        federation.received[ids[0], 2].channels["control_variates"].tensors[name],
        expected,
        rtol=1e-3,
        atol=1e-6,
    )


def test_fedprox_and_the_optimizer_reach_the_clients(tmp_path):
    train = {"proximal": 0.25, "optimizer": "sgd", "warmup_ratio": 0.5}
    _, federation, ids = run_rival(tmp_path, "WithinType", train=train)
    asked = federation.received[ids[0], 1].header.train
    assert (asked.proximal, asked.optimizer, asked.warmup_ratio) == (0.25, "sgd", 0.5)


def test_the_rate_follows_half_a_cosine_over_the_rounds(tmp_path):
    train = {"learning_rate": 0.02, "last_rate": 0.1}
    _, federation, ids = run_rival(tmp_path, "WithinType", rounds=3, train=train)
    rates = [federation.received[ids[0], round].header.train.learning_rate for round in (1, 2, 3)]
    assert rates == pytest.approx([0.02, 0.011, 0.002])
    constant, single, last = {"learning_rate": 0.02}, {**train}, {**train, "last_rate": 1.0}
    for options, rounds in ((constant, 2), (single, 1), (last, 2)):
        _, federation, ids = run_rival(tmp_path, "WithinType", rounds=rounds, train=options)
        assert federation.received[ids[0], rounds].header.train.learning_rate == 0.02


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi", "adagrad"])
def test_any_strategy_takes_a_server_optimizer(tmp_path, kind):
    optimizer = {"kind": kind, "learning_rate": 0.1}
    strategy, federation, ids = run_rival(
        tmp_path, "FedIT", method=LORA, server_optimizer=optimizer
    )
    start = strategy.groups.first_values(SMALL)[A].astype(float)
    mean = np.mean([federation.answered[cid, 1][A] for cid in ids], axis=0) - start
    first = 0.1 * mean
    second = {
        "adam": 0.99e-6 + 0.01 * mean**2,
        "yogi": 1e-6 - 0.01 * mean**2 * np.sign(1e-6 - mean**2),
        "adagrad": 1e-6 + mean**2,
    }
    step = 0.1 * mean
    if kind != "momentum":
        step = 0.1 * first / (np.sqrt(second[kind]) + 1e-3)
    np.testing.assert_allclose(strategy.state[SMALL][A], start + step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_component_": f"{HERE}.FedExLoRA", "method": LORA}, "FedExLoRA adds dense changes"),
        ({"_component_": f"{HERE}.FLoRA", "method": LORA}, r"small@nf4 keeps at nf4"),
        ({"_component_": f"{HERE}.FlexLoRA", "method": LORA, "ranks": [0]}, r"ranks is \[0\]"),
        ({"_component_": f"{HERE}.HETLoRA", "method": LORA, "ranks": "4"}, "ranks is '4'"),
        ({"_component_": f"{HERE}.FedIT", "server_optimizer": {"kind": "adm"}}, "choose from sgd"),
        ({"_component_": f"{HERE}.FedIT", "server_optimizer": {"lr": 1}}, "no key 'lr'"),
        ({"_component_": f"{HERE}.FedIT", "server_optimizer": "adam"}, "key: value pairs"),
        ({"_component_": f"{HERE}.FedIT", "server_optimizer": {"tau": "x"}}, "number above 0"),
        (
            {"_component_": f"{HERE}.HeteroTune", "server_optimizer": {"kind": "adam"}},
            "in its chain",
        ),
        ({"_component_": f"{HERE}.FlexLoRA", "server_optimizer": {"kind": "adam"}}, "by an SVD"),
        (
            {"_component_": f"{HERE}.WithinType", "train": {"optimizer": "sdg"}},
            "did you mean 'sgd'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, spec, message):
    config = toy_config(tmp_path)
    config.types[0].bits, config.run.compare = "nf4", ["rival"]
    with pytest.raises(ConfigError, match=message):
        check_strategy("rival", spec, config)


def test_scaffold_needs_sgd(tmp_path):
    with pytest.raises(ConfigError, match="optimizer=sgd"):
        run_rival(tmp_path, "Scaffold")


def test_flowers_fedavg_inside_a_type_is_within_type(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours, _, _ = run_rival(tmp_path / "ours", "WithinType", rounds=2)
    theirs, _, _ = run_rival(tmp_path / "theirs", "FlowerInside", rounds=2, strategy="FedAvg")
    for name, value in ours.shared_tensors().items():
        np.testing.assert_allclose(theirs.shared_tensors()[name], value, atol=1e-6)


def test_flowers_fedadam_inside_a_type(tmp_path):
    options = {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    strategy, federation, ids = run_rival(
        tmp_path, "FlowerInside", method=LORA, strategy="FedAdam", options=options
    )
    start = strategy.groups.first_values(SMALL)[A].astype(float)
    mean = np.mean([federation.answered[cid, 1][A] for cid in ids], axis=0) - start
    rate = (
        0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    )  # Flower's bias correction counts rounds from 0
    step = rate * 0.1 * mean / (np.sqrt(0.01 * mean**2) + 1e-3)
    np.testing.assert_allclose(strategy.state[SMALL][A], start + step, rtol=1e-3, atol=1e-6)


def test_flowers_krum_inside_a_type_takes_one_clients_tensors(tmp_path):
    strategy, federation, ids = run_rival(
        tmp_path, "FlowerInside", clients=(4, 1, 1), strategy="flwr.serverapp.strategy.Krum",
        options={"num_malicious_nodes": 1},
    )  # fmt: skip
    name = "slots.0.experts.global.0.up.weight"
    found = [
        np.allclose(strategy.state[SMALL][name], federation.answered[cid, 1][name], atol=1e-6)
        for cid in ids
    ]
    assert sum(found) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs strategy"),
        ({"strategy": "FedAvgg"}, "FedAvgg"),
        ({"strategy": "pathlib.Path"}, "no strategy of Flower's Message API"),
        ({"strategy": "FedAvg", "options": {"eta": 1}}, "does not take options"),
    ],
)
def test_wrong_flower_strategies_get_one_clear_line(tmp_path, options, message):
    config = toy_config(tmp_path)
    config.run.compare = ["rival"]
    spec = {"_component_": f"{HERE}.FlowerInside", **options}
    with pytest.raises(ConfigError, match=message):
        check_strategy("rival", spec, config)
