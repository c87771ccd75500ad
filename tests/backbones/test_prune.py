"""Structured pruning: nothing cut changes nothing, little importance goes first, healing heals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_backbones import TEXTS, save_backbone, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from heterotune_flwr.backbones.prune import (
    heal,
    measure_activations,
    prune,
    prune_and_heal,
)
from heterotune_flwr.errors import BackboneError


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("prune") / "parent")


def loaded(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def rows(count: int = 24) -> torch.Tensor:
    return torch.randint(3, 250, (count, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_keeping_everything_keeps_the_function(parent):
    model = loaded(parent)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # weights of one would hide a mistake in folding
            parameter.copy_(
                torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) + 0.5
            )
    same = prune(model, measure_activations(model, rows()), hidden=32, layers=3).eval()
    ids = rows(4)
    torch.testing.assert_close(same(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_block_that_does_nothing_and_dead_channels_go_first(parent):
    model = loaded(parent)
    dead = model.model.layers[1]
    dead.self_attn.o_proj.weight.zero_()
    dead.mlp.down_proj.weight.zero_()
    model.get_input_embeddings().weight[:, 16:] = 0  # half of the residual stream carries nothing
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[16:] = 0
        layer.mlp.down_proj.weight[16:] = 0
        layer.mlp.down_proj.weight[:, 32:] = 0  # nor do half of the units
        layer.self_attn.o_proj.weight[:, 16:] = 0  # nor the second key-value group
    found = measure_activations(model, rows())
    assert found.change.argmin() == 1
    assert found.groups[0, 0] > found.groups[0, 1] == 0
    assert found.units[0, :32].min() > found.units[0, 32:].max()
    small = prune(model, found, hidden=16, layers=2).eval()
    assert small.config.num_attention_heads == 2
    assert small.config.num_key_value_heads == 1
    assert small.config.intermediate_size == 32
    ids = rows(4)
    torch.testing.assert_close(small(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_healing_brings_predictions_back_to_the_parents_and_is_reproducible(parent):
    texts = TEXTS * 40

    @torch.no_grad()
    def apart(small, model, ids) -> float:
        said, wanted = (m(ids).logits.log_softmax(-1) for m in (small, model))
        return float((wanted.exp() * (wanted - said)).sum(-1).mean())

    def run() -> tuple[float, float, torch.Tensor]:
        model = loaded(parent)
        tokenizer = AutoTokenizer.from_pretrained(parent)
        ids = torch.tensor(tokenizer(" ".join(texts))["input_ids"][: 40 * 16]).reshape(40, 16)
        small = prune(model, measure_activations(model, ids), hidden=16, layers=2)
        before = apart(small, model, ids)
        heal(small, model, ids, 30, 0, lambda line: None, learning_rate=3e-3)
        return before, apart(small, model, ids), small.model.layers[0].mlp.up_proj.weight

    before, after, weight = run()
    assert after < 0.6 * before
    assert torch.equal(weight, run()[2])


def test_the_result_is_an_ordinary_backbone_directory(parent, tmp_path):
    lines: list[str] = []
    target = tmp_path / "small"
    losses = prune_and_heal(
        parent, target, TEXTS * 60, hidden=16, layers=2, tokens=2000, report=lines.append
    )
    assert set(losses) == {"parent", "pruned", "healed"}
    assert abs(losses["healed"] - losses["parent"]) < abs(losses["pruned"] - losses["parent"])
    assert any("healed" in line for line in lines)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.config.hidden_size == 16
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(target)("red apples")["input_ids"]


def test_mistakes_are_named(parent, tmp_path):
    with pytest.raises(BackboneError, match="cannot prune 32 x 3 to 64 x 3"):
        prune_and_heal(parent, tmp_path / "x", TEXTS * 60, hidden=64, layers=3)
    with pytest.raises(BackboneError, match="tokens; 96 are needed"):
        prune_and_heal(parent, tmp_path / "x", TEXTS[:1], hidden=16, layers=2)
    other = tmp_path / "neox"
    tokenizer = save_tokenizer(other)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(other)  # fmt: skip
    with pytest.raises(BackboneError, match="only the Llama architecture"):
        prune_and_heal(other, tmp_path / "x", TEXTS, hidden=8, layers=1)
