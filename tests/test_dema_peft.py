"""DeMA as a PEFT tuner, on tiny random decoders of six families."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from dema_models import (
    FAMILIES,
    dema_config,
    logits,
    naive_logits,
    randomize,
    save_base,
    snapshot,
    tiny_model,
    tokens,
)
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import PeftType
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from heterotune_flwr.dema import DeMAConfig, DeMALayer, load_tensors, registration
from heterotune_flwr.dema.access import active_adapter, slot_layers, trainable_tensors
from heterotune_flwr.dema.structure import find_structure, slot_blocks
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
    config = dema_config(gate="top1", mlp_modules=["a", "b"], final_norm_module="n")
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
    with pytest.raises(BackboneError, match="name the blocks' MLPs with mlp_modules"):
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
    with pytest.raises(BackboneError, match=r"method.slots is 5 but the backbone has 4 blocks"):
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
        model = get_peft_model(tiny_model(family), dema_config(slots=2, private_dropout=0.5))
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


def test_a_fresh_adapter_has_the_mode_of_its_backbone() -> None:
    """Loaded backbones are in evaluation mode: private experts must not be dropped there."""
    for mode in (False, True):
        model = get_peft_model(tiny_model().train(mode), dema_config(slots=2))
        assert {module.training for layer in slot_layers(model) for module in layer.modules()} == {
            mode
        }


def test_casting_the_whole_model_down() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=2)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in trainable_tensors(model).values():
            parameter.fill_(0.1)
        assert torch.isfinite(model(tokens()).logits).all()


# saving and loading --------------------------------------------------------------------------------------


@families
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(family), dema_config(slots=2, seed=8))
    randomize(model)
    expected = logits(model, tokens())
    values, maps = snapshot(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as stored:
        names = list(stored.keys())
        assert not any(".default" in name or "base_layer" in name for name in names)
        assert sum(stored.get_tensor(name).size for name in names) == sum(
            value.size for value in (*values.values(), *maps.values())
        )
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path, adapter_name="other")
    assert torch.equal(logits(again, tokens()), expected)
    assert not any(p.requires_grad for p in again.parameters())


def test_maps_of_a_run_travel_with_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), dema_config())
    _, maps = snapshot(model)
    from heterotune_flwr.dema import load_maps, read_maps

    load_maps(model, {name: value + 1 for name, value in maps.items()})
    model.save_pretrained(tmp_path)
    again = read_maps(PeftModel.from_pretrained(tiny_model(), tmp_path))
    for name, value in maps.items():
        np.testing.assert_array_equal(again[name], value + 1)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_peft_model(tmp_path: Path, lean: bool, dtype: torch.dtype) -> None:
    """``low_cpu_mem_usage`` makes PEFT cast adapters to the base's dtype; DeMA's stay in float32."""
    base = save_base(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), dema_config())
    randomize(model)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=dtype, low_cpu_mem_usage=lean, is_trainable=True
    )
    assert torch.equal(logits(again, tokens()), expected)
    assert {p.dtype for p in trainable_tensors(again).values()} == {torch.float32}
    assert slot_layers(again)[0].dema_maps["default"].up_weight.dtype == torch.float32
    assert all(p.requires_grad for p in trainable_tensors(again).values())


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model("gpt_neox"), dema_config()).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="made for another backbone"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


def test_transformers_own_adapter_interface(tmp_path: Path) -> None:
    model = tiny_model()
    expected = logits(model, tokens())
    get_peft_model(tiny_model(), dema_config()).save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(model, tokens()), expected)
    randomize(model)
    assert not torch.equal(logits(model, tokens()), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, tokens()), expected)


# several adapters ----------------------------------------------------------------------------------------


def test_disable_adapter() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    bare = logits(model, tokens())
    randomize(model)
    changed = logits(model, tokens())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), bare)
    assert torch.equal(logits(model, tokens()), changed)
    assert not torch.equal(changed, bare)
    assert all(p.requires_grad for p in trainable_tensors(model).values())


def two_adapters() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with adapters of different slots, widths and experts, and each one's logits."""
    model = get_peft_model(tiny_model(), dema_config(slots=1, latent=4, experts_private=0))
    randomize(model, seed=1)
    seen = {"default": logits(model, tokens())}
    model.add_adapter("deep", dema_config(slots=3, output=None))
    model.set_adapter("deep")
    randomize(model, seed=2)
    seen["deep"] = logits(model, tokens())
    return model, seen


def test_two_adapters_of_different_depth() -> None:
    model, seen = two_adapters()
    assert not torch.allclose(seen["default"], seen["deep"])
    for name in ("default", "deep", "default"):
        model.set_adapter(name)
        assert active_adapter(model) == name
        assert torch.equal(logits(model, tokens()), seen[name])
        slots = {int(key.split(".")[1]) for key in trainable_tensors(model)}
        assert slots == ({0} if name == "default" else {0, 1, 2})
        own = {id(p) for p in trainable_tensors(model).values()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == own


def test_adding_an_adapter_does_not_activate_it() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=1))
    randomize(model)
    before = logits(model, tokens())
    own = {id(p) for p in trainable_tensors(model).values()}
    model.add_adapter("second", dema_config(slots=2, experts_global=4))
    assert torch.equal(logits(model, tokens()), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


def test_two_adapters_at_once_add_up() -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=1))
    ids = tokens()
    body = model.get_base_model().model
    with torch.no_grad():
        bare = body.eval()(ids).last_hidden_state
        randomize(model, seed=1)
        first = body(ids).last_hidden_state - bare
        model.add_adapter("second", dema_config(slots=1, latent=5))
        model.set_adapter("second")
        randomize(model, seed=2)
        second = body(ids).last_hidden_state - bare
        model.base_model.set_adapter(["default", "second"])
        both = body(ids).last_hidden_state - bare
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4)


def test_two_adapters_are_saved_apart(tmp_path: Path) -> None:
    model, seen = two_adapters()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "deep")
    assert torch.equal(logits(again, tokens()), seen["deep"])
    again.load_adapter(tmp_path, adapter_name="shallow")
    again.set_adapter("shallow")
    assert torch.equal(logits(again, tokens()), seen["default"])


def test_delete_adapter() -> None:
    model, seen = two_adapters()
    model.delete_adapter("deep")
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens()), seen["default"])
    left = [m for m in model.modules() if isinstance(m, DeMALayer) and "deep" in m.slots]
    assert left == []
    assert not any("deep" in name for name in model.state_dict())


def test_unload_gives_the_backbone_back() -> None:
    bare = tiny_model()
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    model = get_peft_model(bare, dema_config(slots=3))
    randomize(model)
    back = model.unload()
    assert back is bare
    after = back.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = get_peft_model(back, dema_config(slots=2))
    assert len(slot_layers(again)) == 2


def test_merge_says_why_and_what_to_do() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    randomize(model)
    expected = logits(model, tokens())
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        slot_layers(model)[0].merge,
    ):
        with pytest.raises(HeteroTuneError, match=r"non-linear branch.*save_pretrained.*distil"):
            merge()
    assert torch.equal(logits(model, tokens()), expected)
    assert not model.base_model.supports_lora_conversion()


def test_status_and_counts() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in trainable_tensors(model).values())
    assert everything > trainable
    status = model.get_model_status()
    assert status.peft_types == {"default": "DEMA"}
    assert status.num_adapter_layers == 2
    assert status.trainable_params == trainable


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


def test_load_tensors_keeps_optimizers_valid() -> None:
    """Values are copied in place: an optimizer made before goes on with the same parameters."""
    model = get_peft_model(tiny_model(), dema_config())
    before = trainable_tensors(model)
    load_tensors(model, {name: p.detach().numpy() + 1 for name, p in before.items()})
    after = trainable_tensors(model)
    assert all(after[name] is parameter for name, parameter in before.items())
