"""HeteroFL, FedRolex and FedMosaic: closed forms on the toy federation, slices of real models, real clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dema_models import tiny_model
from real_clients import World
from tiny_adapters import TRAIN, logits
from tiny_backbones import LABELS
from toy_federation import toy_config
from toy_runs import HERE, run_rival
from transformers import LlamaForCausalLM

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.dema.bank import initial_tensors, tier_of
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.slices import as_fraction, open_mesh, window
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.schema import MethodConfig, TypeConfig
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.strategies.build import check_strategy
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import FullRows, make_rows
from heterotune_flwr.tuning.submodel import SliceTask
from heterotune_flwr.tuning.task import make_task

HEAD, SMALL = "sub.head", "type/small@fp32"
SUB = {"kind": "submodel"}
SLICE = MethodConfig(kind="submodel", output=3)
RATIOS = [1.0, 0.5, 0.25]
IDS = torch.tensor([[4, 9, 30, 7, 12]])


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


def slice_by_hand(parent, width, first):
    """A LLaMA of its own, its weights picked entry by entry from the parent's."""
    old = parent.config
    small = type(old).from_dict(old.to_dict())
    small.hidden_size, small.intermediate_size = (
        int(old.hidden_size * width),
        int(old.intermediate_size * width),
    )
    small.num_attention_heads = int(old.num_attention_heads * width)
    small.num_key_value_heads = int(old.num_key_value_heads * width)
    small.head_dim = old.head_dim
    model = LlamaForCausalLM(small).float().eval()

    def places(whole, part):
        return [(first + i) % whole if part < whole else i for i in range(part)]

    hidden = places(old.hidden_size, small.hidden_size)
    units = places(old.intermediate_size, small.intermediate_size)
    groups = places(old.num_key_value_heads, small.num_key_value_heads)
    per, size = old.num_attention_heads // old.num_key_value_heads, old.head_dim
    keys = [g * size + i for g in groups for i in range(size)]
    queries = [(g * per + h) * size + i for g in groups for h in range(per) for i in range(size)]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden, "gate_proj": units,
            "up_proj": units, "down_proj": hidden}  # fmt: skip
    columns = {"o_proj": queries, "down_proj": units}
    weights = dict(parent.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            kind = name.split(".")[-2]
            whole = weights[name].float()
            if "norm" in name:
                value.copy_(whole[hidden])
            elif "embed" in name:
                value.copy_(whole[:, hidden])
            else:
                value.copy_(whole[rows[kind]][:, columns.get(kind, hidden)])
    return model


@pytest.mark.parametrize("bits", ["bf16", "fp32"])
@pytest.mark.parametrize(("width", "first"), [(1.0, 0), (1.0, 3), (0.5, 0), (0.5, 1), (0.5, 7)])
def test_a_slice_is_the_model_cut_by_hand(directory, bits, width, first):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    detach(backbone)
    bare = logits(backbone.model)
    adapter = attach(backbone, replace(SLICE, sub_width=width, sub_window=first), 3)
    adapter.load(initial_tensors(adapter.shapes, 0))
    by_hand = slice_by_hand(backbone.model, width, first)
    torch.testing.assert_close(logits(adapter.model), logits(by_hand), rtol=1e-4, atol=1e-5)
    count = sum(p.numel() for p in by_hand.parameters())
    assert sum(int(np.prod(shape)) for shape in adapter.shapes.values()) == count  # all of it
    rng = np.random.default_rng(1)
    changes = {n: rng.normal(size=s).astype(np.float32) / 20 for n, s in adapter.shapes.items()}
    adapter.load(changes)
    with torch.no_grad():
        for name, value in by_hand.named_parameters():
            change = changes["sub." + name.removesuffix(".weight")]
            value += torch.from_numpy(change).to(value).reshape(value.shape)
    torch.testing.assert_close(logits(adapter.model), logits(by_hand), rtol=1e-3, atol=1e-4)
    assert (np.abs(logits(by_hand) - bare).max() > 1e-2).all()
    detach(backbone)
    np.testing.assert_array_equal(logits(backbone.model), bare)


def test_the_scaler_divides_every_blocks_layers_by_the_width(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = attach(backbone, replace(SLICE, sub_width=0.5, sub_scaler=True), 3)
    adapter.load(initial_tensors(adapter.shapes, 0))
    by_hand = slice_by_hand(backbone.model, 0.5, 0)
    with torch.no_grad():
        for name, value in by_hand.named_parameters():
            value *= 2.0 if "_proj" in name else 1.0
    torch.testing.assert_close(logits(adapter.model), logits(by_hand), rtol=1e-4, atol=1e-5)
    detach(backbone)


def test_the_slices_tensors_fit_the_servers_windows(directory):
    """What the client cuts with its window is what the server would cut out of the parent's tensors."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    parent = attach(backbone, SLICE, 3)
    names = list(parent.shapes)
    rng = np.random.default_rng(2)
    changes = {n: rng.normal(size=parent.shapes[n]).astype(np.float32) / 20 for n in names}
    whole = {n: torch.from_numpy(v).to(backbone.device) for n, v in changes.items()}
    hand = slice_by_hand(backbone.model, 1.0, 0)
    with torch.no_grad():
        for name, value in hand.named_parameters():
            value += whole["sub." + name.removesuffix(".weight")].reshape(value.shape)
    part = attach(backbone, replace(SLICE, sub_width=0.5, sub_window=5), 3)
    part.load({n: changes[n][open_mesh(changes[n].shape, part.shapes[n], 5)] for n in names})
    expected = logits(slice_by_hand(hand, 0.5, 5))
    torch.testing.assert_close(logits(part.model), expected, rtol=1e-3, atol=1e-4)
    detach(backbone)


@pytest.mark.parametrize("loss", ["labels", "tokens"])
def test_training_moves_all_of_a_slice_its_unembedding_too(directory, data, loss):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    config = replace(TRAIN, loss=loss, learning_rate=1e-3)
    adapter = attach(backbone, replace(SLICE, sub_width=0.5), 3)
    adapter.load(initial_tensors(adapter.shapes, 0))
    adapter.train_from(0)
    task = adapter.reads(make_task(backbone, data, list(LABELS), config))
    encoded = task.encode(training_pool(data)[:8])
    rows = make_rows(adapter, encoded)
    assert type(rows) is FullRows
    before = evaluate(adapter, task, rows)
    fit(adapter, task, replace(config, local_steps=12), [Examples(rows)], seed=0)
    assert all(value.any() for value in adapter.read().values())
    assert evaluate(adapter, task, rows).loss < before.loss
    read = {token for ids in encoded.inputs for token in ids}
    if loss == "labels":
        # Rows of label words that no prompt holds learn from the unembedding alone.
        assert isinstance(task, SliceTask)
        unread = [token for token in task.tokens if token not in read]
        assert unread
        assert all(adapter.read()["sub.model.embed_tokens"][token].any() for token in unread)
    detach(backbone)


def test_other_parents_are_refused(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "nf4"))
    with pytest.raises(ConfigError, match="at bf16 or fp32 only"):
        attach(backbone, SLICE, 3)
    whole = load_backbone(BackboneSpec(str(directory), "fp32"))
    for family, message in (("gpt_neox", "is 'gpt_neox'"), ("mistral", "is 'mistral'")):
        with pytest.raises(ConfigError, match=message):
            attach(replace(whole, model=tiny_model(family)), SLICE, 3)
    biased = tiny_model("llama")
    biased.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj"):
        attach(replace(whole, model=biased), SLICE, 3)


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
    assert all(tier_of(n) == "sub" for n in state)
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
