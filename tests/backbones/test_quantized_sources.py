"""Checkpoints that were quantized before they came here: used as they are, or refused naming both formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import save_backbone, save_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from heterotune_flwr.backbones import store
from heterotune_flwr.backbones.bits import needed_gb, resolve_spec, weight_bytes
from heterotune_flwr.backbones.headers import tensor_headers
from heterotune_flwr.backbones.loading import (
    BackboneSpec,
    load_backbone,
    prepare_libraries,
)
from heterotune_flwr.backbones.sources import QUANTIZED
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import BITS

IDS = torch.tensor([[5, 9, 30, 7, 12, 3, 100, 64]])
#: bits -> what people write who publish such a checkpoint; float16 and float32 computing are usual
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float16},
    "nf4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary checkpoint, and the same one quantized by transformers in each format."""
    prepare_libraries("nf4")
    root = tmp_path_factory.mktemp("checkpoints")
    found = {"base": save_backbone(root / "base", hidden=64)}
    for bits, fields in CONFIGS.items():
        model = AutoModelForCausalLM.from_pretrained(
            found["base"],
            quantization_config=BitsAndBytesConfig(**fields),
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
        )
        model.save_pretrained(root / bits)
        save_tokenizer(root / bits)
        found[bits] = root / bits
    return found


@pytest.mark.parametrize("stored", CONFIGS)
@pytest.mark.parametrize("bits", BITS)
def test_its_own_bits_are_used_in_place_and_others_refused(
    folders: dict[str, Path], stored: str, bits: str
) -> None:
    spec = BackboneSpec(str(folders[stored]), bits)
    if bits != stored:
        with pytest.raises(BackboneError, match=rf"{stored} .* {bits}:"):
            load_backbone(spec, "cpu")
        return
    backbone = load_backbone(spec, "cpu")
    assert store.entries() == []
    whole = load_backbone(BackboneSpec(str(folders["base"]), bits), "cpu")
    assert backbone.parameters == whole.parameters
    assert backbone.linear_shapes == whole.linear_shapes
    with torch.no_grad():
        assert torch.equal(backbone.model(IDS).logits, whole.model(IDS).logits)
    # ... and still trained through after that evaluation.
    shift = torch.zeros(64, requires_grad=True)
    embedded = backbone.model.get_input_embeddings()(IDS) + shift.to(backbone.model.dtype)
    backbone.model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert shift.grad is not None
    assert shift.grad.abs().max() > 0


@pytest.mark.parametrize("stored", CONFIGS)
def test_auto_counts_the_bytes_that_are_there(folders: dict[str, Path], stored: str) -> None:
    source, folder = str(folders[stored]), folders[stored]
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    header = 150 * len(tensor_headers(source, folder))
    assert abs(weight_bytes(source, folder, stored) - held) < header
    assert weight_bytes(source, folder, "bf16") == weight_bytes("b", folders["base"], "bf16")
    needs = needed_gb(source, folder)
    assert list(needs) == [stored]
    assert needs[stored] == pytest.approx(
        needed_gb("b", folders["base"], [stored])[stored], rel=1e-3
    )
    assert resolve_spec(source, "auto", None, None, "cpu").bits == stored
    assert resolve_spec(source, "auto", None, needs[stored], "cpu").bits == stored
    with pytest.raises(BackboneError, match=rf"does not fit 0\.10 GB.*{stored} [0-9.]+ GB"):
        resolve_spec(source, "auto", None, 0.1, "cpu")


@pytest.mark.parametrize(
    ("declared", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
         "bitsandbytes fp4"),
        ({**CONFIGS["nf4"], "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16"},
         "packed as bfloat16"),
        ({"bits": 3}, "unknown format"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_other_formats_are_refused_in_a_line(
    folders: dict[str, Path], tmp_path: Path, declared: dict[str, Any], named: str, nested: bool
) -> None:
    folder = shutil.copytree(folders["base"], tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    part = config.setdefault("text_config", {"vocab_size": 9}) if nested else config
    part["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config))
    for bits in ("nf4", "bf16"):
        with pytest.raises(
            BackboneError, match=rf"'.*theirs' is a .*{named}.*checkpoint"
        ) as raised:
            load_backbone(BackboneSpec(str(folder), bits), "cpu")
        assert "\n" not in str(raised.value)
    with pytest.raises(BackboneError, match=named):
        resolve_spec(str(folder), "auto", None, None, "cpu")
    with pytest.raises(BackboneError, match=named):
        resolve_spec(str(folder), "auto", None, 8.0, "cpu")


def test_a_run_is_refused_before_any_work(folders: dict[str, Path]) -> None:
    for bits in set(BITS) - {"int8"}:
        run = [f"types=[{{backbone: {folders['int8']}, bits: {bits}, clients: 2}}]"]
        with pytest.raises(BackboneError, match=rf"as int8 .* as {bits}"):
            preflight(compose("quick", run))
    assert set(CONFIGS) == set(QUANTIZED)
