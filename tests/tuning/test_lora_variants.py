"""LoRA with a core or a dense change, terms in the gradient, and every shipped strategy on real clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from real_clients import run
from tiny_adapters import LORA, METHOD, TRAIN, gradients, logits, prepared, random_values
from tiny_backbones import LABELS, save_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.channels.control_variates.client import Correction
from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.lora import dense_weight
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.optimizer import make_optimizer, rate_schedule
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

CORE = replace(LORA, lora_core=True, lora_rank=4)
DENSE = replace(LORA, lora_residual=True)
SQUARE = replace(METHOD, core_rank=2, core_from=0.0)


@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16", "fp32"])
def test_a_core_sits_between_singular_vectors_of_the_layers_own_weight(directory, bits):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    detach(backbone)
    bare = logits(backbone.model)
    adapter = attach(backbone, CORE, 3)
    assert len(adapter.shapes) == 7 * 3
    assert set(adapter.shapes.values()) == {(4, 4)}
    np.testing.assert_array_equal(logits(adapter.model), bare)  # cores start at zero
    layer = backbone.model.get_submodule("model.layers.1.mlp.down_proj")
    weight = dense_weight(layer.get_base_layer()).float()
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    found = layer.lora_B["default"].weight @ torch.diag(sizes[:4]) @ layer.lora_A["default"].weight
    torch.testing.assert_close(found.data, (left[:, :4] * sizes[:4]) @ right[:4], atol=2e-3, rtol=0)
    adapter.load(random_values(adapter.shapes))
    assert not torch.equal(logits(adapter.model), bare)
    detach(backbone)
    np.testing.assert_array_equal(logits(backbone.model), bare)


@pytest.mark.parametrize("method", [CORE, DENSE])
def test_a_variant_is_the_dense_change_its_formula_says(directory, method):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    detach(backbone)
    adapter = attach(backbone, method, 3)
    values = random_values(adapter.shapes, scale=0.1)
    adapter.load(values)
    found = logits(adapter.model)
    scale = method.lora_alpha / method.lora_rank
    changes = {}
    for name in {n.rpartition(".")[0] for n in values}:
        layer = backbone.model.get_submodule(name.removeprefix("lora."))
        if method.lora_core:
            core = torch.from_numpy(values[f"{name}.R"]).to(backbone.device)
            change = layer.lora_B["default"].weight @ core @ layer.lora_A["default"].weight
        else:
            change = torch.from_numpy(values[f"{name}.B"] @ values[f"{name}.A"]).to(found)
        changes[name] = scale * change.detach()
        if method.lora_residual:
            changes[name] = changes[name] + torch.from_numpy(values[f"{name}.residual"]).to(found)
    detach(backbone)
    try:
        for name, change in changes.items():
            backbone.model.get_submodule(name.removeprefix("lora.")).weight.data += change
        torch.testing.assert_close(found, logits(backbone.model), rtol=1e-3, atol=1e-3)
    finally:
        for name, change in changes.items():
            backbone.model.get_submodule(name.removeprefix("lora.")).weight.data -= change


@pytest.mark.parametrize("method", [LORA, CORE, DENSE, SQUARE, replace(SQUARE, core_kind="lora")])
def test_layers_of_gpt2_are_linear_layers(tmp_path, method):
    """Their ``Conv1D`` holds in x out; PEFT adapts it, so it counts."""
    tokenizer = save_tokenizer(tmp_path)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(BackboneSpec(str(tmp_path), "fp32"))
    assert backbone.linear_shapes == 2 * ((32, 96), (32, 32), (32, 128), (128, 32))
    bare = logits(backbone.model)
    adapter = attach(backbone, method, 3)
    if method == LORA:
        held = sum(int(np.prod(shape)) for shape in adapter.shapes.values()) / method.lora_rank
        assert backbone.lora16_bytes == 2 * 16 * held
    if method.lora_core:
        layer = backbone.model.get_submodule("transformer.h.1.mlp.c_fc")
        found = dense_weight(layer.get_base_layer())
        assert found.shape == (128, 32)
        assert torch.equal(found, layer.get_base_layer().weight.T)
    assert len({name.rpartition(".")[0] for name in adapter.shapes if "transformer" in name}) == 8
    adapter.load(random_values(adapter.shapes))
    assert not torch.equal(logits(adapter.model), bare)
    detach(backbone)
    np.testing.assert_array_equal(logits(backbone.model), bare)


@pytest.mark.parametrize("method", [LORA, DENSE])
def test_frozen_tensors_act_and_stay(directory, data, method):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    task = make_task(backbone, data, list(LABELS), TRAIN)
    adapter = prepared(backbone, method)
    held = [name for name in adapter.shapes if name.endswith(".A")]
    adapter.train_from(0, held)
    before = adapter.read()
    rows = make_rows(adapter, task.encode(training_pool(data)[:8]), cache=False)
    fit(adapter, task, replace(TRAIN, local_steps=2), [Examples(rows)], seed=0)
    after = adapter.read()
    for name, value in after.items():
        moved = not np.array_equal(value, before[name])
        assert moved == name.endswith(".B"), name
    with pytest.raises(ExchangeError, match=r"hold fixed are unknown: lora\.x"):
        adapter.train_from(0, ["lora.x"])
    with pytest.raises(ExchangeError, match="all tensors"):
        adapter.train_from(0, list(adapter.shapes))
    adapter.train_from(0)


@pytest.mark.parametrize(
    ("warmup", "shares"), [(0.0, (1, 1, 1)), (0.5, (2 / 3, 1, 1)), (1.0, (1 / 3, 2 / 3, 1))]
)
def test_gradient_terms_against_a_loop_by_hand(directory, data, warmup, shares):
    """SGD with FedProx's pull and SCAFFOLD's correction, clipped after both, at a rate that warms up."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    config = replace(
        TRAIN, optimizer="sgd", proximal=0.7, clip_norm=0.5, warmup_ratio=warmup, local_steps=3
    )
    task = make_task(backbone, data, list(LABELS), config)
    adapter = prepared(backbone)
    start = {n: torch.from_numpy(v).to(backbone.device) for n, v in adapter.read().items()}
    corrections = {n: 0.05 * torch.ones_like(v) for n, v in start.items()}
    rows = make_rows(adapter, task.encode(training_pool(data)[:8]), cache=True)
    added = [Correction(corrections, adapter.trained)]
    fit(adapter, task, config, [Examples(rows)], added, seed=3)
    found = adapter.read()
    adapter.load({n: v.cpu().numpy() for n, v in start.items()})
    own, rng = Examples(rows), np.random.default_rng(3)
    for share in shares:
        chosen = own.draw(config.batch_size, rng)
        _, grads = gradients(adapter, task, rows, chosen)
        total = {}
        for (name, value), grad in zip(adapter.parameters.items(), grads, strict=True):
            total[name] = grad + 0.7 * (value.detach() - start[name]) + corrections[name]
        norm = torch.sqrt(sum(g.square().sum() for g in total.values()))
        factor = min(1.0, 0.5 / (float(norm) + 1e-6))
        with torch.no_grad():
            for name, value in adapter.parameters.items():
                value -= share * config.learning_rate * factor * total[name]
    for name, value in adapter.read().items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


@pytest.mark.parametrize("warm", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_gates_learn_at_their_own_share_of_the_rate(share, warm):
    """AdamW's first step moves every number by its rate, whatever the gradient."""
    names = ["slots.0.experts.global.0.up.weight", "slots.0.gate.weight", "slots.1.gate.bias"]
    trained = {name: torch.nn.Parameter(torch.zeros(3)) for name in names}
    optimizer = make_optimizer(trained, replace(TRAIN, gate_rate=share, learning_rate=0.01))
    rate_schedule(optimizer, warm)
    for value in trained.values():
        value.grad = torch.tensor([5.0, -1e-3, 2.0])
    optimizer.step()
    for name, value in trained.items():
        rate = 0.01 / warm * (share if "gate" in name else 1.0)
        expected = rate * torch.tensor([-1.0, 1.0, -1.0])
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_root() / "strategy").glob("*.yaml")))
def test_every_shipped_strategy_runs_and_moves_what_it_shares(world, name):
    small = "slots=2", "latent=8", "inner=4"  # 3 blocks of width 8
    few = [f"strategies.{name}.method.{x}" for x in small if name in ("co_lora", "fedmosaic")]
    if name in ("heterofl", "fedrolex"):  # one parent, of two key-value heads
        with pytest.raises(ConfigError, match="have none in common"):
            run(world, name)
        one = compose(str(world.path / "run.yaml")).types[0].backbone
        few = [
            f"'types=[{{backbone: {one}, bits: bf16, clients: 4}}]'",
            f"strategies.{name}.ratios=[1.0,0.5]",
        ]
    strategy = run(world, name, overrides=f"train.batch_size=2 {' '.join(few)}")
    assert len(strategy.outcome.rows) == 4
    for group, tensors in strategy.state.items():
        first = strategy.groups.first_values(group)
        assert all(np.isfinite(value).all() for value in tensors.values())
        assert any(not np.array_equal(value, first[n]) for n, value in tensors.items())
    assert bool(strategy.state) == (name not in ("local_only", "fedmkt"))


@pytest.mark.parametrize("warmup", [0.0, 0.8])
def test_server_and_clients_agree_on_scaffolds_control_variates(world, warmup):
    """With everybody taking part, c is the mean of the clients' own c_i, each kept in its client's file."""
    # A shortened update is not what its client remembers.
    overrides = f"strategies.scaffold.train.warmup_ratio={warmup} server.norm_limit=null"
    strategy = run(world, "scaffold", rounds=3, overrides=overrides)
    (channel,) = strategy.channels
    for type_key in strategy.roster.type_keys:
        members = [int(cid.split("-")[1]) for cid in strategy.roster.of_type(type_key)]
        kept = [world.state(client, strategy.context.experiment) for client in members]
        for name, value in channel.control(type_key).items():
            mean = np.mean([own[f"control.{name}"] for own in kept], axis=0)
            np.testing.assert_allclose(value, mean, rtol=1e-3, atol=1e-5)
