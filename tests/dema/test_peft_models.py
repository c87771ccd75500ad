"""DeMA adapters saved and loaded, switched off, several at once, taken out again; as PEFT's other tuners do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dema_models import (
    FAMILIES,
    dema_config,
    logits,
    randomize,
    save_base,
    snapshot,
    tiny_model,
    tokens,
)
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from heterotune_flwr.dema import DeMALayer
from heterotune_flwr.dema.access import active_adapter, slot_layers, trainable_tensors
from heterotune_flwr.errors import BackboneError, ConfigError, HeteroTuneError

families = pytest.mark.parametrize("family", FAMILIES)


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


def test_an_adapter_from_before_all_experts_were_for_all(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It loads, by the same names, where it has no others; else one line says that they are no more."""
    model = get_peft_model(tiny_model(), dema_config())
    randomize(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as stored:
        assert sum(".dema_experts.global_tier.1." in name for name in list(stored.keys())) == 2 * 3
    path = tmp_path / "adapter_config.json"
    before = {"experts_type": 0, "experts_private": 0, "private_dropout": 0.3}
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | before))
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert not any("Unexpected keyword" in str(warned.message) for warned in recwarn)
    path.write_text(json.dumps(saved | before | {"experts_private": 1}))
    with pytest.raises(ConfigError, match=r"experts_private is 1; [^\n]* are no more"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


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
    model = get_peft_model(tiny_model(), dema_config(slots=1, latent=4, experts_global=2))
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
        with pytest.raises(HeteroTuneError, match=r"save_pretrained.*distil"):
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
