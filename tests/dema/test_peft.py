"""DeMA as a PEFT tuner, on tiny random decoders of six families."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dema_models import (
    FAMILIES,
    dema_config,
    logits,
    naive_logits,
    randomize,
    snapshot,
    tiny_model,
    tokens,
)
from peft import PeftModel, get_peft_model
from peft.utils import PeftType
from transformers import AutoConfig, AutoModelForCausalLM

from heterotune_flwr.backbones.structure import find_structure, slot_blocks
from heterotune_flwr.dema import DeMAConfig, registration
from heterotune_flwr.dema.access import slot_layers, trainable_tensors
from heterotune_flwr.errors import BackboneError, HeteroTuneError

families = pytest.mark.parametrize("family", FAMILIES)


# registration: the canary of a new PEFT ------------------------------------------------------------------


def test_registration_canary() -> None:
    member = registration.register()
    assert member is PeftType.DEMA is PeftType("DEMA") is PeftType["DEMA"]
    assert "DEMA" in list(PeftType)
    assert copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "DEMA"}'
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is DeMAConfig
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] == "dema_"
    assert registration.register() is member


def test_an_untested_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration.peft, "__version__", "0.99.0")
    with pytest.raises(HeteroTuneError, match=r"peft 0\.99\.0 is installed.*>=0\.21,<0\.22"):
        registration.register.__wrapped__()


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = dema_config(gate="uniform", mlp_modules=["a", "b"], final_norm_module="n")
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, DeMAConfig)
    assert again.to_dict() == config.to_dict()


# structure -----------------------------------------------------------------------------------------------


@families
def test_structure(family: str) -> None:
    model = tiny_model(family)
    found = find_structure(model)
    layers = FAMILIES[family][0]
    assert len(found.mlps) == layers
    assert found.hidden == 32
    assert model.get_submodule(found.final_norm) is model.get_decoder().get_submodule(
        found.final_norm.rpartition(".")[2]
    )
    wrapped = get_peft_model(model, dema_config(slots=layers))
    inside = find_structure(wrapped)
    assert inside.mlps == tuple(f"base_model.model.{name}" for name in found.mlps)
    assert inside.final_norm == f"base_model.model.{found.final_norm}"


def test_structure_skips_the_vision_tower() -> None:
    """A multimodal model whose vision tower has as many blocks as its decoder."""
    text = AutoConfig.for_model(
        "gemma3_text", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration(config)
    found = find_structure(model)
    assert "language_model" in found.blocks
    assert found.final_norm.endswith("language_model.norm")
    assert found.hidden == 32


def test_no_decoder_no_mlp_no_norm() -> None:
    model = tiny_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(BackboneError, match="no list of 3 decoder blocks"):
        find_structure(model)
    opt = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, word_embed_proj_dim=32,
    )  # fmt: skip
    with pytest.raises(BackboneError, match="mlp_modules"):
        find_structure(AutoModelForCausalLM.from_config(opt))
    model = tiny_model()
    del model.model.norm
    with pytest.raises(BackboneError, match="name it with final_norm_module"):
        find_structure(model)


def test_slots_at_equal_relative_depth() -> None:
    assert slot_blocks(1, 5) == []
    assert slot_blocks(2, 4) == [1]
    assert slot_blocks(3, 7) == [2, 4]
    assert slot_blocks(4, 4) == [0, 1, 2]
    with pytest.raises(BackboneError, match=r"method\.slots is 5"):
        slot_blocks(5, 4)


def test_more_slots_than_blocks() -> None:
    with pytest.raises(BackboneError, match="use at most 3 slots"):
        get_peft_model(tiny_model(), dema_config(slots=4))


def test_modules_named_by_hand() -> None:
    model = get_peft_model(
        tiny_model(),
        dema_config(mlp_modules=["model.layers.2.mlp"] * 2, final_norm_module="model.norm"),
    )
    assert model.peft_config["default"].slot_modules == ["model.layers.2.mlp", "model.norm"]
    with pytest.raises(BackboneError, match=r"has no model\.nomr"):
        get_peft_model(tiny_model(), dema_config(final_norm_module="model.nomr"))


def test_many_slots_stay_in_order() -> None:
    """PEFT shortens and shuffles target lists of 20 and more; the slots must not care."""
    bare = tiny_model("llama", layers=22)
    config = dema_config(slots=22)
    model = get_peft_model(copy.deepcopy(bare), config).eval()
    randomize(model, scale=0.1)
    layers = slot_layers(model)
    base = model.get_base_model()
    assert [layer.slots["default"] for layer in layers] == list(range(22))
    assert layers[-1] is base.model.norm
    assert all(layer is base.model.layers[k].mlp for k, layer in enumerate(layers[:-1]))


# forward and backward ------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("slots", [1, 2])
def test_identical_logits_at_round_zero(family: str, slots: int) -> None:
    bare = tiny_model(family)
    expected = logits(bare, tokens())
    assert expected.std() > 0.01
    model = get_peft_model(bare, dema_config(slots=slots))
    assert torch.equal(logits(model, tokens()), expected)


@families
@pytest.mark.parametrize("slots", [1, 2])
def test_the_whole_model_against_the_naive_formula(family: str, slots: int) -> None:
    bare = tiny_model(family)
    config = dema_config(slots=slots)
    model = get_peft_model(copy.deepcopy(bare), config)
    randomize(model)
    values, maps = snapshot(model)
    found = logits(model, tokens())
    expected = naive_logits(bare, tokens(), config, values, maps)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits(bare, tokens())).abs().max() > 0.05


@families
def test_gradients_reach_every_slot_at_round_zero(family: str) -> None:
    """P starts at 0, D and U do not: the bank learns from the first step, the backbone never."""
    layers = FAMILIES[family][0]
    model = get_peft_model(tiny_model(family), dema_config(slots=layers))
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in trainable_tensors(model).items():
        assert parameter.grad is not None
        if name.endswith("up.weight"):
            assert parameter.grad.any(), name
    own = {id(p) for p in trainable_tensors(model).values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@families
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = get_peft_model(tiny_model(family), dema_config(slots=2))
        randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(3)
        model(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in trainable_tensors(model).items()}

    plain, lean = gradients(False), gradients(True)
    for name, grad in plain.items():
        torch.testing.assert_close(lean[name], grad, rtol=1e-4, atol=1e-6)
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())


@families
def test_generation_with_cache(family: str) -> None:
    model = get_peft_model(tiny_model(family), dema_config(slots=2)).eval()
    bare = model.get_base_model()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    with model.disable_adapter():
        before = model.generate(input_ids=prompt, attention_mask=mask, **options)
    randomize(model, scale=1.0)
    cached = model.generate(input_ids=prompt, attention_mask=mask, use_cache=True, **options)
    fresh = model.generate(input_ids=prompt, attention_mask=mask, use_cache=False, **options)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, fresh)
    assert not torch.equal(cached, before)
    assert next(iter(bare.parameters())).requires_grad is False


def test_left_padding_does_not_change_the_answer() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=2)).eval()
    randomize(model)
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(ids).logits[:, -1]
        shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=2)).train()
    optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=3e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_casting_the_whole_model_down() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=2)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in trainable_tensors(model).values():
            parameter.fill_(0.1)
        assert torch.isfinite(model(tokens()).logits).all()


# mixture-of-experts backbones ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixture_of_experts_backbones(family: str, tmp_path: Path) -> None:
    """PEFT rewrites the target lists of these families; the slots do not depend on them."""
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(config).eval()
    state = copy.deepcopy(bare.state_dict())
    expected = logits(bare, tokens())
    model = get_peft_model(bare, dema_config(slots=2))
    assert torch.equal(logits(model, tokens()), expected)
    randomize(model)
    changed = logits(model, tokens())
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(again, tokens()), changed)
