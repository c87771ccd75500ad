"""The backbone store: same bits as without it, one copy, whole or absent, mended when damaged."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heterotune_flwr.backbones import loading, store
from heterotune_flwr.backbones.cpu_compute import compute_in_float32
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone, load_unshared
from heterotune_flwr.backbones.sources import resolve_source
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.schema import BITS

IDS = torch.tensor([[5, 9, 30, 7, 12, 3, 100, 64]])


def spec_of(source, bits="nf4"):
    return BackboneSpec(str(source), bits)


def entry_of(spec):
    return store.entry_dir(spec, resolve_source(spec.source), "cpu")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def fresh(spec):
    loading.clear_backbones()
    return load_backbone(spec, "cpu")


def is_mapped(tensor, path):
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(value, 16) for value in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(str(path))
    return False


@pytest.mark.parametrize("source", ["tiny-a", "little"])
@pytest.mark.parametrize("bits", BITS)
def test_stored_weights_are_bit_for_bit_those_of_the_direct_load(directory, bits, source, caplog):
    spec = spec_of(directory if source == "little" else source, bits)
    loading.prepare_libraries(bits)
    direct = load_unshared(spec, resolve_source(spec.source), "cpu")
    if loading.slow_bfloat16():
        compute_in_float32(direct)  # as load_backbone does; the weights are compared below
    made, found = fresh(spec), fresh(spec)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "stor" in r.message]
    in_place = (source, bits) in (("tiny-a", "bf16"), ("little", "fp32"))  # stored like that
    place = None if in_place else entry_of(spec)
    assert [path.name for path in store.entries()] == ([place.name] if place else [])
    wanted = direct.state_dict()
    for backbone in (made, found):
        tensors = backbone.model.state_dict()
        assert tensors.keys() == wanted.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(tensor, wanted[name]), name
        assert torch.equal(logits(backbone.model), logits(direct))
        assert backbone.parameters == made.parameters
        for name, buffer in backbone.model.named_buffers():  # rotary frequencies are in no file
            assert torch.equal(buffer, direct.get_buffer(name)), name
    file = (place or resolve_source(spec.source)) / "model.safetensors"
    for name, parameter in found.model.named_parameters():
        assert is_mapped(parameter, file), name
    # Also after computing, which is when bitsandbytes moves weights about.
    layer = found.model.model.layers[0].mlp.up_proj
    weight = layer.state.CB if bits == "int8" else layer.weight
    assert is_mapped(weight, file)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_through_stored_weights_survive_an_evaluation(directory, bits):
    fresh(spec_of(directory, bits))
    model = fresh(spec_of(directory, bits)).model
    shift = torch.zeros(32, requires_grad=True)

    def gradient():
        model.train()
        shift.grad = None
        embedded = model.get_input_embeddings()(IDS) + shift.to(model.dtype)
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        model.eval()
        assert shift.grad is not None
        return shift.grad.clone()

    before = gradient()
    first = logits(model)
    assert before.abs().max() > 0
    torch.testing.assert_close(gradient(), before)
    assert torch.equal(logits(model), first)


def test_writing_to_a_weight_never_reaches_the_stored_file(directory):
    spec = spec_of(directory)
    backbone = fresh(spec)
    file = entry_of(spec) / "model.safetensors"
    before = file.read_bytes()
    backbone.model.model.norm.weight.data.zero_()
    backbone.model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert file.read_bytes() == before


_WORKER = """
import hashlib, logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
torch.set_num_threads(1)
sys.stdin.readline()
model = load_backbone(BackboneSpec(sys.argv[1], sys.argv[2]), "cpu").model
with torch.no_grad():
    out = model(torch.tensor([[5, 9, 30, 7, 12, 3, 100, 64]])).logits.float().numpy()
print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_processes_that_come_at_once_quantize_once(directory, cache):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(directory), "nf4"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [process.communicate("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert sum(err.count("making the shared copy") for _, err in answers) == 1
    assert sum(err.count("copy of its own") for _, err in answers) == 0
    assert len(store.entries()) == 1
    assert not [path for path in (cache / "store").glob(".*") if path.is_dir()]


def _truncate(entry):
    file = entry / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(entry):
    file = entry / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-200] ^= 255
    file.write_bytes(bytes(data))


def _no_manifest(entry):
    (entry / "manifest.json").unlink()


def _no_weights(entry):
    (entry / "model.safetensors").unlink()


@pytest.mark.parametrize("hurt", [_truncate, _flip, _no_manifest, _no_weights])
def test_a_damaged_entry_is_made_again_with_a_warning(directory, hurt, caplog):
    spec = spec_of(directory)
    before = logits(fresh(spec).model)
    entry = entry_of(spec)
    good = (entry / "model.safetensors").read_bytes()
    hurt(entry)
    caplog.clear()
    assert torch.equal(logits(fresh(spec).model), before)
    (line,) = [r.message for r in caplog.records if r.name == store.__name__ and r.levelno > 20]
    assert "damaged" in line
    assert str(entry) in line
    assert (entry / "model.safetensors").read_bytes() == good
    caplog.clear()
    fresh(spec)
    assert not [r for r in caplog.records if r.name == store.__name__ and r.levelno >= 20]


def test_an_entry_that_does_not_fit_its_model_is_not_used(directory, caplog):
    """Checksums hold, but the quantization is gone from its configuration: made again."""
    from heterotune_flwr.backbones.manifest import read_manifest, write_manifest

    spec = spec_of(directory, "int8")
    before = logits(fresh(spec).model)
    entry = entry_of(spec)
    config = json.loads((entry / "config.json").read_text())
    del config["quantization_config"]
    (entry / "config.json").write_text(json.dumps(config))
    write_manifest(entry, read_manifest(entry) or {})
    assert torch.equal(logits(fresh(spec).model), before)
    assert "cannot be read" in caplog.text


def test_a_killed_builder_leaves_nothing_that_is_used_or_stays(directory, cache):
    spec = spec_of(directory)
    entry = entry_of(spec)
    rest = cache / "store" / f".{entry.name}.abcd"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"half")
    fresh(spec)
    assert entry.is_dir()
    assert not rest.exists()


def test_other_library_versions_make_another_entry(directory, monkeypatch):
    spec, plain = spec_of(directory), spec_of(directory, "fp32")
    before, plain_before = entry_of(spec), entry_of(plain)
    assert entry_of(BackboneSpec(str(directory), "nf4", "v2")) != before
    monkeypatch.setattr(store, "version", lambda name: "9.9.9")
    assert entry_of(spec) != before
    monkeypatch.setattr(
        store, "version", lambda name: "5.23.0" if name == "transformers" else "9.9.9"
    )
    assert "bitsandbytes" not in store.libraries("fp32")
    assert store.libraries("nf4")["bitsandbytes"] == "9.9.9"
    assert plain_before.name.startswith("fp32-")


_LIMITED = """
import logging, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
exec(sys.stdin.read())
"""


def test_a_full_disk_costs_memory_only_and_leaves_nothing_half(directory, cache):
    """The kernel refuses to write more than 20 kB into a file: the store cannot be written."""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(directory), "nf4"],
        input=_WORKER.replace("sys.stdin.readline()\n", ""), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if "copy of its own" in text]
    assert "File too large" in line
    assert store.entries() == []
    assert not [path for path in (cache / "store").iterdir() if path.is_dir()]
    spec = BackboneSpec(str(directory), "nf4")
    ours = logits(fresh(spec).model)
    assert done.stdout.strip() == hashlib.sha256(ours.float().numpy().tobytes()).hexdigest()
    assert len(store.entries()) == 1


def test_too_little_space_is_seen_beforehand(directory, monkeypatch, caplog):
    monkeypatch.setattr(
        store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})()
    )
    fresh(spec_of(directory))
    assert "GB needed, 0.00 GB free" in caplog.text
    assert store.entries() == []


def test_a_cache_that_cannot_be_written_costs_memory_only(directory, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "file"))
    model = fresh(spec_of(directory)).model
    assert "copy of its own" in caplog.text
    assert logits(model).isfinite().all()


def _damaged_copy(directory, target):
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("bits", ["nf4", "bf16", "fp32"])
def test_a_truncated_source_is_one_line_that_says_what_and_where(directory, tmp_path, bits):
    source = _damaged_copy(directory, tmp_path / "hurt")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match=r"model\.safetensors.*download") as raised:
        fresh(spec_of(source, bits))
    assert str(source) in str(raised.value)
    assert "\n" not in str(raised.value)
    file.write_bytes(b"nonsense")
    with pytest.raises(BackboneError, match="truncated or no safetensors file"):
        fresh(spec_of(source, bits))
    assert store.entries() == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_json_in_a_source_is_one_line(directory, tmp_path, name):
    source = _damaged_copy(directory, tmp_path / "hurt")
    (source / name).write_text((source / name).read_text()[:-20])
    with pytest.raises(BackboneError, match=re.escape(name)) as raised:
        fresh(spec_of(source))
    assert str(source) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_source_without_all_weights_is_refused(directory, tmp_path):
    """Transformers would go on with random numbers."""
    from safetensors.torch import load_file, save_file

    source = _damaged_copy(directory, tmp_path / "hurt")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"layers\.1\.mlp\.up_proj"):
        fresh(spec_of(source, "bf16"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_four_processes_hold_one_copy(bits):
    from benchmarks.speed.shared_weights import private_cache, pss_ratio

    with private_cache("tiny-c"):
        found = pss_ratio("tiny-c", bits, runs=1)
    assert 0.9 < found["files_only"] < 1.1
    assert found["anonymous_mb"] < 3  # a copy of its own would be 5 to 8


def test_a_truncated_source_stops_a_run_before_it_starts(directory, tmp_path):
    from heterotune_flwr.config.compose import compose
    from heterotune_flwr.preflight import preflight

    source = _damaged_copy(directory, tmp_path / "hurt")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    config = compose("quick", [f"types=[{{backbone: {source}, bits: nf4, clients: 2}}]"])
    with pytest.raises(BackboneError, match="its header promises"):
        preflight(config)
