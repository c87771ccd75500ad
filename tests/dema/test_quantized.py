"""DeMA over really quantized backbones: bitsandbytes nf4 and int8, and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dema_models import dema_config, logits, randomize, save_base, tokens
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from heterotune_flwr.backbones.bnb_cpu import apply_repacking_remedy
from heterotune_flwr.dema.access import slot_layers, trainable_tensors

BITS = ("bf16", "int8", "nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def load_options(bits: str) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if bits == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if bits == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return options


def load(base: Path, bits: str) -> Any:
    apply_repacking_remedy()
    model = AutoModelForCausalLM.from_pretrained(base, **load_options(bits)).eval()
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == {"bf16": "Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}[bits]
    return model


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("slots", [1, 3])
def test_identical_logits_then_training(base: Path, bits: str, slots: int) -> None:
    bare = load(base, bits)
    expected = logits(bare, tokens())
    frozen = {n: p.detach().clone() for n, p in bare.named_parameters()}
    model = get_peft_model(bare, dema_config(slots=slots))
    assert torch.equal(logits(model, tokens()), expected)
    optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=3e-2)
    losses = []
    for _ in range(12):
        logits(model, tokens())  # evaluate in between, as every federated client does
        ids = tokens().to(model.device)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in trainable_tensors(model).values():
            assert parameter.grad is not None
            assert parameter.dtype == torch.float32
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), expected)
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("bits", BITS)
def test_save_and_load(base: Path, bits: str, tmp_path: Path) -> None:
    model = get_peft_model(load(base, bits), dema_config(slots=3))
    randomize(model)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base, bits), tmp_path)
    assert torch.equal(logits(again, tokens()), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path, **load_options(bits))
    assert torch.equal(logits(auto, tokens()), expected)


@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_and_generation(base: Path, bits: str) -> None:
    model = get_peft_model(load(base, bits), dema_config(slots=3))
    randomize(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        ids = tokens().to(model.device)
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in trainable_tensors(model).items()}

    model.train()
    torch.manual_seed(0)
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    lean = gradients()
    model.gradient_checkpointing_disable()
    for name, grad in plain.items():
        torch.testing.assert_close(lean[name], grad, rtol=1e-3, atol=1e-5)
    model.eval()
    prompt = tokens(2, 5).to(model.device)
    written = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert written.shape == (2, 11)


@pytest.mark.parametrize("bits", BITS)
def test_kept_states_equal_the_full_forward(base: Path, bits: str) -> None:
    bare = load(base, bits)
    ids = tokens().to(bare.device)
    with torch.no_grad():
        frozen = bare.model(ids).last_hidden_state
        model = get_peft_model(bare, dema_config(slots=1))
        randomize(model)
        full = bare.model(ids).last_hidden_state
    assert torch.equal(slot_layers(model)[-1].add_delta(frozen, frozen), full)
    assert slot_layers(model)[0].base_layer.weight.dtype == torch.bfloat16
