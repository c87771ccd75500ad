"""Products of bfloat16 backbones in float32, where a CPU has no fast bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_backbones import save_backbone
from torch import nn
from torch.nn import functional

from heterotune_flwr.backbones import cpu_compute, loading
from heterotune_flwr.backbones.cpu_compute import Float32Linear, compute_in_float32
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone


@pytest.mark.parametrize("at_a_time", [2**22, 64, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_float32_one_rounded_once(at_a_time, bias, monkeypatch):
    monkeypatch.setattr(cpu_compute, "WEIGHTS_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 17, bias=bias).to(torch.bfloat16).requires_grad_(False)
    inputs = torch.randn(2, 5, 24, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(2, 5, 17, generator=generator).bfloat16()

    compute_in_float32(layer)
    assert type(layer) is Float32Linear
    layer(inputs).backward(upstream)

    wide = inputs.detach().float().requires_grad_()
    expected = functional.linear(wide, layer.weight.float(), layer.bias.float() if bias else None)
    expected.backward(upstream.float())
    # Parts are summed in another order: the last bit of a bfloat16 may differ.
    torch.testing.assert_close(layer(inputs), expected.bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(inputs.grad, wide.grad.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("onednn", "has", "slow"),
    [
        (False, {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        (True, {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        (True, {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        (True, {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        (True, {"architecture": "arm64", "bf16": True}, False),
        (True, {}, False),
    ],
)
def test_bfloat16_is_slow_without_instructions_for_it(onednn, has, slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert cpu_compute.slow_bfloat16.__wrapped__() is slow


def test_other_dtypes_and_trained_weights_are_left_alone():
    narrow = nn.Linear(8, 4)
    compute_in_float32(narrow)
    assert type(narrow) is nn.Linear
    trained = nn.Linear(8, 4).to(torch.bfloat16)
    compute_in_float32(trained)
    trained(torch.ones(3, 8, dtype=torch.bfloat16)).sum().backward()
    torch.testing.assert_close(trained.weight.grad, torch.full((4, 8), 3.0).bfloat16())


@pytest.mark.parametrize("bits", ["bf16", "int8", "nf4"])
def test_a_backbone_computes_the_same(bits, tmp_path, monkeypatch):
    directory = save_backbone(tmp_path / "little", layers=2)
    spec, ids = BackboneSpec(str(directory), bits), torch.arange(5, 45).view(2, 20)

    def run(slow):
        monkeypatch.setattr(loading, "slow_bfloat16", lambda: slow)
        loading.clear_backbones()
        model = load_backbone(spec).model
        states = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=states).logits
        assert logits.dtype == torch.bfloat16
        logits.float().logsumexp(-1).sum().backward()
        names = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
        return logits.detach().float(), states.grad.float(), names

    logits, gradients, names = run(slow=False)
    wide_logits, wide_gradients, wide_names = run(slow=True)
    assert names == wide_names
    assert (logits - wide_logits).norm() < 0.02 * logits.norm()
    assert (gradients - wide_gradients).norm() < 0.05 * gradients.norm()


def test_nothing_is_copied(tmp_path):
    model = copy.deepcopy(
        load_backbone(BackboneSpec(str(save_backbone(tmp_path / "a")), "bf16")).model
    )
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    compute_in_float32(model)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_trained_in_float32_and_frozen_passes_stay_as_they_were(
    tmp_path, masked, monkeypatch
):
    model = load_backbone(BackboneSpec(str(save_backbone(tmp_path / "a", layers=2)), "bf16")).model
    ids = torch.arange(5, 45).view(2, 20)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, 12:] = 0
    attend, used = functional.scaled_dot_product_attention, set()

    def spy(query, *rest, **options):
        used.add(query.dtype)
        return attend(query, *rest, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)

    def frozen():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    def gradient():
        states = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=states, attention_mask=mask).logits
        assert logits.dtype == torch.bfloat16
        logits[mask.bool()].float().logsumexp(-1).sum().backward()
        return states.grad.float()

    ours = frozen()
    assert used == {torch.bfloat16}
    used.clear()
    trained = gradient()
    assert used == {torch.float32}
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, frozen())
    plain = gradient()
    assert (trained - plain).norm() < 0.05 * plain.norm()


def test_other_attention_is_left_alone(tmp_path):
    directory = save_backbone(tmp_path / "a", layers=2)
    model = copy.deepcopy(load_backbone(BackboneSpec(str(directory), "bf16")).model)
    model.set_attn_implementation("eager")
    cpu_compute.train_attention_in_float32(model)
    assert model.config._attn_implementation == "eager"
