"""HeteroFL, FedRolex and FedMosaic: closed forms on the toy federation, slices of real models, real clients."""

from __future__ import annotations

import numpy as np
import pytest
from real_clients import World
from toy_federation import toy_config
from toy_runs import HERE, run_rival

from heterotune_flwr.config.compose import compose
from heterotune_flwr.dema.bank import part_of
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.slices import as_fraction, open_mesh, window
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.schema import TypeConfig
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.strategies.build import check_strategy

HEAD, SMALL = "sub.head", "type/small@fp32"
SUB = {"kind": "submodel"}
RATIOS = [1.0, 0.5, 0.25]


# ------------------------------------------------------------------------------------ the windows


def test_a_window_goes_round_and_a_whole_axis_stays_in_order():
    assert window(5, 3, 0).tolist() == [0, 1, 2]
    assert window(5, 3, 4).tolist() == [4, 0, 1]
    assert window(5, 3, 14).tolist() == [4, 0, 1]
    assert window(5, 5, 3).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="length 6"):
        window(5, 6, 0)
    with pytest.raises(ValueError, match="length 0"):
        window(5, 0, 0)
    with pytest.raises(ValueError, match="of shape"):
        open_mesh((2, 3), (2,), 0)


@pytest.mark.parametrize(
    ("width", "text"), [(1.0, "1"), (0.5, "1/2"), (0.3333, "1/3"), (0.667, "2/3")]
)
def test_widths_are_simple_fractions(width, text):
    assert str(as_fraction(width)) == text


# ------------------------------------------------------------------------- closed forms, toy world


def holders_mean(federation, ids, round, start, parent_width=24):
    """Entry by entry, with a plain loop: the mean over the clients whose window of this round holds it."""
    values = [[] for _ in range(parent_width)]
    rows = {}
    for cid in ids:
        request, answer = federation.received[cid, round], federation.answered[cid, round][HEAD]
        count = answer.shape[1]
        first = request.header.method.sub_window if count < parent_width else 0
        for place in range(count):
            values[(first + place) % parent_width].append(answer[:, place])
    for column, held in enumerate(values):
        rows[column] = np.mean(held, axis=0) if held else start[:, column]
    return np.stack([rows[c] for c in range(parent_width)], axis=1), [len(v) for v in values]


@pytest.mark.parametrize("ratios", [RATIOS, [0.5, 0.5, 0.25]])
@pytest.mark.parametrize(("name", "windows"), [("HeteroFL", [0, 0, 0]), ("FedRolex", [0, 1, 2])])
def test_every_entry_is_the_mean_over_the_clients_that_hold_it(tmp_path, name, windows, ratios):
    strategy, federation, ids = run_rival(
        tmp_path, name, rounds=3, clients=(3, 0, 0), method=SUB, ratios=ratios
    )
    state = np.zeros((6, 24))
    for round, first in enumerate(windows, start=1):
        for cid, ratio in zip(ids, ratios, strict=True):
            request = federation.received[cid, round]
            assert request.header.method.sub_width == ratio
            assert request.header.method.sub_window == first
            columns = [(first + i) % 24 if ratio < 1 else i for i in range(round_half(24 * ratio))]
            np.testing.assert_allclose(request.tensors[HEAD], state[:, columns], atol=1e-6)
        state, counts = holders_mean(federation, ids, round, state)
        if ratios == RATIOS:
            assert sorted(set(counts)) == [1, 2, 3]
        else:
            assert counts.count(0) == 12  # held by nobody: as before
    np.testing.assert_allclose(strategy.state[SMALL][HEAD], state, rtol=1e-5, atol=1e-6)
    assert np.abs(state).max() > 1e-3


def round_half(value):
    return int(value + 0.5)


def test_equal_widths_are_plain_averaging(tmp_path):
    strategy, federation, ids = run_rival(
        tmp_path, "HeteroFL", clients=(3, 0, 0), method=SUB, ratios=[1.0]
    )
    mean = np.mean([federation.answered[cid, 1][HEAD] for cid in ids], axis=0)
    np.testing.assert_allclose(strategy.state[SMALL][HEAD], mean, rtol=1e-5, atol=1e-7)
    assert not strategy.models_differ


def test_each_width_is_reported_as_a_type_of_its_own_before_and_after(tmp_path):
    strategy, _, ids = run_rival(tmp_path, "HeteroFL", clients=(3, 0, 0), method=SUB, ratios=RATIOS)
    for rows in (strategy.outcome.before, strategy.outcome.rows):
        assert {row.client_id: row.type_key for row in rows} == dict(
            zip(ids, ["small@fp32 x1", "small@fp32 x1/2", "small@fp32 x1/4"], strict=True)
        )
        assert len({row.global_accuracy for row in rows}) == 3  # everybody was asked
    text = (tmp_path / "run" / "rounds.jsonl").read_text()
    assert '"slices"' in text


def test_bytes_are_those_of_the_slices(tmp_path):
    strategy, federation, ids = run_rival(
        tmp_path, "FedRolex", clients=(3, 0, 0), method=SUB, ratios=RATIOS
    )
    sizes = [federation.received[cid, 1].tensors[HEAD].shape for cid in ids]
    assert sizes == [(6, 24), (6, 12), (6, 6)]
    assert strategy.outcome.bytes["up_per_client_round"] > 4 * 6 * 14


def test_fedmosaic_shares_p_and_q_with_all_and_never_moves_the_gate(tmp_path):
    strategy, federation, _ = run_rival(tmp_path, "FedMosaic", rounds=2, method={"slots": 1})
    everybody = list(strategy.roster.clients)
    p, q = "slots.0.experts.global.0.up.weight", "slots.0.experts.global.0.up.bias"
    assert set(strategy.state) == {"global"}
    assert set(strategy.state["global"]) == {p, q}
    assert strategy.state["global"][p].shape == (6, 8)
    for name in (p, q):
        mean = np.mean([federation.answered[cid, 2][name] for cid in everybody], axis=0)
        np.testing.assert_allclose(strategy.state["global"][name], mean, rtol=1e-5, atol=1e-7)
        assert np.abs(mean).max() > 1e-4
    for cid in everybody:
        assert "slots.0.gate.weight" in federation.received[cid, 1].frozen
        assert not strategy.groups.first_values("global")[p].any()  # a run starts at the backbones


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "types", "message"),
    [
        ({"_component_": f"{HERE}.HeteroFL"}, 3, "out of one parent, and .* have none in common"),
        ({"_component_": f"{HERE}.FedRolex"}, 1, "FedRolex trains and averages whole weights"),
        ({"_component_": f"{HERE}.HeteroFL", "ratios": [2]}, 1, r"ratios is \[2\]"),
        ({"_component_": f"{HERE}.HeteroFL", "ratios": "half"}, 1, "ratios is 'half'"),
        ({"_component_": f"{HERE}.HeteroFL", "scaler": 2}, 1, "scaler is 2"),
        (
            {"_component_": f"{HERE}.FedRolex", "server_optimizer": {"kind": "adam"}},
            1,
            "leaves alone what no client holds",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, spec, types, message):
    config = toy_config(tmp_path)
    config.types = config.types[:types]
    config.types[0].bits, config.run.compare = "nf4" if types == 1 else "bf16", ["rival"]
    with pytest.raises(ConfigError, match=message):
        check_strategy("rival", {**spec, "method": SUB}, config)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("HeteroFL", None, "method.kind=submodel"),
        ("FedMosaic", {"kind": "lora"}, "method.kind=dema"),
    ],
)
def test_a_strategy_says_which_method_it_needs(tmp_path, name, method, message):
    with pytest.raises(ConfigError, match=message):
        run_rival(tmp_path, name, clients=(2, 0, 0), method=method)


# ------------------------------------------------------------------------ slices of a real model


# --------------------------------------------------------------------------------- real clients


def real(world, name, overrides="", ratios="[1.0,0.5]", parent="one", bits="bf16"):
    words = (
        f"'types=[{{backbone: {world.path / parent}, bits: {bits}, clients: 4}}]' exchange.codec=fp32 "
        f"server.rounds=2 server.evaluate_every=0 train.local_steps=2 strategies.{name}.ratios={ratios} {overrides}"
    )
    path = world.path / "shipped.yaml"
    path.write_text(
        (world.path / "run.yaml").read_text().replace("strategies: {}", f"strategies: [{name}]")
    )
    config = compose(str(path), words)
    session = Session(
        World(world.path, str(path), words).grid, config, Journal(world.path / "journal"), "sub-0"
    )
    strategy = build_strategy(config.strategies[name], StrategyContext(name, config, 0, session))
    strategy.start(session.grid)
    return strategy


@pytest.fixture
def parent(folder, world):
    (world.path / "one").symlink_to(folder / "one")
    return world


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_real_clients_train_slices_and_the_parent_moves(parent, name):
    strategy = real(parent, name)
    (group,) = strategy.state
    state = strategy.state[group]
    assert all(part_of(n) == "sub" for n in state)
    assert all(np.isfinite(v).all() and v.any() for v in state.values())
    embedding = state["sub.model.embed_tokens"]
    assert embedding[:, -1].any()  # the full-width clients train what no slice holds
    rows = strategy.outcome.rows
    assert len({row.type_key.rpartition(" ")[2] for row in rows}) == 2
    assert all(row.global_accuracy is not None for row in [*rows, *strategy.outcome.before])


def test_only_what_a_window_held_moves(parent):
    """Leading slices alone leave the rest of the parent at its pre-trained values; rolling ones do not."""
    fixed = real(parent, "heterofl", ratios="[0.5]")
    rolling = real(parent, "fedrolex", ratios="[0.5]")
    name = "sub.model.layers.0.mlp.up_proj"  # 64 units x 32 channels
    (kept,), (moved,) = ([s[name] for s in x.state.values()] for x in (fixed, rolling))
    assert not kept[32:].any()
    assert not kept[:, 16:].any()
    assert moved[32].any()
    assert not moved[33:].any()  # two rounds: windows 0 and 1


@pytest.mark.parametrize(
    ("backbone", "ratio", "message"),
    [
        ("tiny-b", 0.5, "width 1/2 of tiny-b .* choose ratios among 1/3, 2/3, 1"),
        ("tiny-c", 0.2, "width 1/5 of tiny-c"),
        ("gemma", 1.0, "LLaMA-type backbones only; .*gemma is 'gemma3'"),
    ],
)
def test_backbones_that_cannot_be_sliced_are_refused_before_any_work(
    tmp_path, backbone, ratio, message
):
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma3"}')
    source = str(tmp_path / backbone) if backbone == "gemma" else backbone
    config = toy_config(tmp_path)
    config.types = [TypeConfig(backbone=source, bits="bf16", clients=2)]
    config.run.compare = ["rival"]
    spec = {"_component_": f"{HERE}.FedRolex", "method": SUB, "ratios": [1.0, ratio]}
    with pytest.raises(ConfigError, match=message):
        check_strategy("rival", spec, config)
    config.types[0].backbone = "tiny-c"
    check_strategy("rival", {**spec, "ratios": [1.0, 0.75]}, config)


def test_a_width_that_would_cut_a_head_ends_the_run_before_training(parent):
    with pytest.raises(FederationError, match="choose ratios among 1/2, 1"):
        real(parent, "heterofl", ratios="[0.25]")
