"""The benchmark of exported models: what all of them come to, cases stay, and a GGUF of another model is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import TEXTS, save_backbone
from transformers import AutoModelForCausalLM

from benchmarks import runner
from benchmarks.science import export
from benchmarks.science.loads import gguf_loads
from heterotune_flwr.export.gguf import write_gguf


def case(**values: float | None) -> dict[str, Any]:
    measures = dict.fromkeys(export.WORST, 1.0)
    return {**measures, "missing": ["tiny-b@int8"], "clients": {}, **values}


def test_the_worst_of_every_measure_counts_and_what_has_none_is_left_out() -> None:
    first = case(logit_difference=2e-6, lora_gain_kept=None, lora_agreement=0.9)
    second = case(logit_difference=1e-6, lora_gain_kept=0.97, gguf_loads=0.0)
    assert export.worst({"a": first, "b": second}) == {
        "metric_difference": 1.0, "logit_difference": 2e-6,
        "lora_gain_kept": 0.97, "lora_agreement": 0.9, "gguf_loads": 0.0,
    }  # fmt: skip
    assert export.worst({"a": first})["lora_gain_kept"] is None


def test_a_case_that_is_measured_later_drops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    export.keep("text, tiny", case(lora_agreement=0.8))
    export.keep("labels, tiny", case(lora_agreement=0.7, rounds=2.0))
    export.keep("labels, tiny", case(lora_agreement=0.9))
    found = runner.read_results("export")
    assert found["measured"] == ["labels, tiny", "text, tiny"]
    assert found["missing"] == [
        "labels, smollm2", "text, smollm2", "labels, tiny, tiny-b@int8", "text, tiny, tiny-b@int8",
    ]  # fmt: skip
    assert found["lora_agreement"] == 0.8
    assert "rounds" not in found["cases"]["labels, tiny"]


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
