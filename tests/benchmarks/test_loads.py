"""The benchmark of models that need nothing of ours: what all models come to, and a GGUF of another model is told."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_backbones import TEXTS, save_backbone
from transformers import AutoModelForCausalLM

from benchmarks.science.loads import gguf_loads, worst
from heterotune_flwr.export.gguf import write_gguf


def test_the_smallest_value_counts_and_what_has_none_is_left_out() -> None:
    first = {"lora_gain_kept": None, "lora_agreement": 0.9, "gguf_loads": 1.0}
    second = {"lora_gain_kept": 0.97, "lora_agreement": 0.95, "gguf_loads": 0.0}
    assert worst({"a": first, "b": second}) == {
        "lora_gain_kept": 0.97, "lora_agreement": 0.9, "gguf_loads": 0.0,
    }  # fmt: skip


def test_a_gguf_file_of_another_model_does_not_count(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "model")
    write_gguf(folder, tmp_path / "m.gguf", "mine")
    good, by = gguf_loads(tmp_path / "m.gguf", folder, TEXTS)
    assert good == 1.0
    assert by[:2] == ["gguf", "transformers"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    model.save_pretrained(folder)
    assert gguf_loads(tmp_path / "m.gguf", folder, TEXTS)[0] == 0.0
