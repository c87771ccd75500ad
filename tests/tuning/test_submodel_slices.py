"""A slice of a real model is that model cut by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dema_models import tiny_model
from tiny_adapters import TRAIN, logits
from tiny_backbones import LABELS
from transformers import LlamaForCausalLM

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.slices import open_mesh
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import FullRows, make_rows
from heterotune_flwr.tuning.submodel import SliceTask
from heterotune_flwr.tuning.task import make_task

SLICE = MethodConfig(kind="submodel", output=3)


IDS = torch.tensor([[4, 9, 30, 7, 12]])


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
        unread = [token for token in task.trie.tokens if token not in read]
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
