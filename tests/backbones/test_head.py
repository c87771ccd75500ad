"""Losses read off final states are the model's own, whatever its family does to its logits; or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import LABELS, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from heterotune_flwr.alignment.factors import unembedding_rows
from heterotune_flwr.backbones.head import HeadScaling, measured_scaling
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.backbones.structure import find_structure
from heterotune_flwr.data.template import make_form
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.schema import DataConfig, TrainConfig
from heterotune_flwr.tuning.task import make_task

#: family -> (extra configuration, what must be measured)
FAMILIES: dict[str, tuple[dict[str, Any], HeadScaling]] = {
    "llama": ({}, HeadScaling()),
    "gpt_neox": ({}, HeadScaling()),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 9.0}, HeadScaling(1.0, 9.0)),
    "recurrent_gemma": ({"lru_width": 32, "logits_soft_cap": 7.0}, HeadScaling(1.0, 7.0)),
    "cohere": ({"logit_scale": 0.0625}, HeadScaling(0.0625)),
    "granite": ({"logits_scaling": 6.0}, HeadScaling(1 / 6)),
    "hyperclovax": ({"logits_scaling": 0.3}, HeadScaling(0.3)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        HeadScaling(0.2),
    ),
}


def save(family: str, folder: Path, **extra: Any) -> Path:
    tokenizer = save_tokenizer(folder)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # logits as large as real ones: a cap must be felt
        model.get_output_embeddings().weight.normal_(std=3.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_models_own(family: str, tmp_path: Path) -> None:
    extra, wanted = FAMILIES[family]
    backbone = load_backbone(
        BackboneSpec(str(save(family, tmp_path / "m", **extra)), "fp32"), "cpu"
    )
    assert backbone.scaling.softcap == wanted.softcap
    assert backbone.scaling.scale == pytest.approx(wanted.scale, rel=1e-6)
    model = backbone.model
    ids = torch.tensor([[5, 9, 30, 7, 12, 3, 100, 64]])
    with torch.no_grad():
        mask = torch.ones_like(ids)
        own = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        body = model.get_submodule(find_structure(model).body)
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0]
        task = make_task(backbone, DataConfig(), None, TrainConfig(loss="tokens"))
        losses, _ = task.losses(states[:-1], ids[0, 1:])
        assert float(losses.mean()) == pytest.approx(float(own.loss), rel=1e-4)
        closed = make_task(backbone, DataConfig(), LABELS, TrainConfig())
        logits = closed.label_logits(states)
    tokens = [ids[0] for ids in make_form(backbone.tokenizer, DataConfig()).label_ids(LABELS)]
    torch.testing.assert_close(logits, own.logits[0][:, tokens].float(), rtol=1e-4, atol=1e-4)
    unscaled = model.get_output_embeddings().weight[tokens].double().numpy()
    assert unembedding_rows(backbone, tokens) == pytest.approx(unscaled * wanted.scale, rel=1e-5)


def test_a_scaled_input_of_the_unembedding_is_a_scale() -> None:
    """As in MiniCPM: states are divided before the unembedding."""
    model = _llama()
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0] / 4,))
    assert measured_scaling(model).scale == pytest.approx(0.25)


def _llama() -> Any:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.register_forward_hook(_masked), "number by number|more than a factor"),
        (lambda m: m.register_forward_hook(_shifted), "more than a factor"),
        (lambda m: m.lm_head.register_forward_pre_hook(lambda _m, a: (a[0].tanh(),)), "final states"),
        (lambda m: m.model.register_forward_hook(_doubled), "final norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_reproduced_is_refused(change: Any, reason: str) -> None:
    model = _llama()
    change(model)
    with pytest.raises(ValueError, match=reason):
        measured_scaling(model)


def _masked(_model: Any, _inputs: Any, output: Any) -> Any:
    output.logits[..., 7] = -1e9
    return output


def _shifted(_model: Any, _inputs: Any, output: Any) -> Any:
    output.logits = output.logits + torch.arange(output.logits.shape[-1])
    return output


def _doubled(_model: Any, _inputs: Any, output: Any) -> Any:
    output.last_hidden_state = 2 * output.last_hidden_state
    return output


def test_a_family_that_does_something_else_is_refused_when_loaded(tmp_path: Path) -> None:
    """CPM-Ant puts prompt tokens of its own in front."""
    tokenizer = save_tokenizer(tmp_path)
    config = AutoConfig.for_model(
        "cpmant", vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, dim_head=8,
        dim_ff=64, num_hidden_layers=2, prompt_length=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cpmant"):
        load_backbone(BackboneSpec(str(tmp_path), "fp32"), "cpu")
