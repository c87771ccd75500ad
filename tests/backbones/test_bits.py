"""``bits: auto`` and the sizes it rests on."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import save_backbone

from heterotune_flwr.backbones import bits, loading
from heterotune_flwr.backbones.bits import CANDIDATES, needed_gb, resolve_spec, weight_bytes
from heterotune_flwr.backbones.headers import weight_files
from heterotune_flwr.backbones.sources import BackboneSpec, resolve_source
from heterotune_flwr.backbones.store import entry_dir, used_in_place
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import BackboneError, ConfigError
from heterotune_flwr.preflight import settle_bits
from heterotune_flwr.schema import BITS


@pytest.mark.parametrize("width", BITS)
def test_the_estimate_is_what_the_weights_take(width):
    spec, source = BackboneSpec("tiny-c", width), resolve_source("tiny-c")
    model = loading.load_backbone(spec, "cpu").model
    place = source if used_in_place(spec, source) else entry_dir(spec, source, "cpu")
    stored = sum(path.stat().st_size for path in weight_files(place))
    held = weight_bytes("tiny-c", source, width)
    assert abs(held - stored) < 0.01 * stored + 40_000  # the header of the file
    if width in ("bf16", "fp32"):
        assert held == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.fixture
def needs():
    return needed_gb("tiny-c", resolve_source("tiny-c"))


def test_the_widest_bits_that_fit_are_chosen(needs):
    assert needs["bf16"] > needs["int8"] > needs["nf4"] > bits.WORKING_GB
    for width in CANDIDATES:
        for budget in (needs[width], needs[width] + 1e-6):
            assert resolve_spec("tiny-c", "auto", None, budget, "cpu").bits == width
    assert resolve_spec("tiny-c", "auto", None, 100.0, "cpu").type_key == "tiny-c@bf16"


def test_too_small_a_budget_names_what_would_do():
    with pytest.raises(BackboneError, match=r"does not fit 0\.10 GB.*nf4 [0-9.]+ GB") as raised:
        resolve_spec("tiny-c", "auto", None, 0.1, "cpu")
    enough = float(str(raised.value).split("nf4 ")[1].split()[0])
    assert resolve_spec("tiny-c", "auto", None, enough, "cpu").bits == "nf4"


def test_quantized_bits_are_not_chosen_where_they_do_not_run(needs):
    with pytest.raises(BackboneError, match="does not run on device 'mps'"):
        resolve_spec("tiny-c", "auto", None, needs["int8"], "mps")
    assert resolve_spec("tiny-c", "auto", None, needs["bf16"], "mps").bits == "bf16"


def test_without_a_budget_a_cpu_takes_bf16_and_named_bits_stay():
    assert resolve_spec("tiny-c", "auto", None, None, "cpu").bits == "bf16"
    assert resolve_spec("tiny-c", "int8", None, 0.001, "cpu").bits == "int8"


def test_free_memory_decides_once_per_run(tmp_path, needs, monkeypatch):
    kept = tmp_path / "run-1"
    monkeypatch.setattr(bits, "free_gb", lambda device: needs["int8"])
    assert resolve_spec("tiny-c", "auto", None, None, "cuda", kept).bits == "int8"
    monkeypatch.setattr(bits, "free_gb", lambda device: needs["bf16"])
    bits.chosen_bits.cache_clear()  # as in the next process
    assert resolve_spec("tiny-c", "auto", None, None, "cuda", kept).bits == "int8"
    assert resolve_spec("tiny-c", "auto", None, None, "cuda", tmp_path / "run-2").bits == "bf16"


def test_the_choice_is_the_type_of_a_client_everywhere(needs, tmp_path):
    config = compose("quick", [
        f"types=[{{backbone: tiny-c, bits: auto, clients: 2, memory_gb: {needs['nf4']}}}]",
        f"run.dir={tmp_path}",
    ])  # fmt: skip
    assert settle_bits(config).types[0].bits == "nf4"
    assert config.types[0].bits == "auto"
    node = {"partition-id": 1, "num-partitions": 2}
    assert identify(config, node).spec.type_key == "tiny-c@nf4"
    deployed = {
        "client-id": "one", "backbone": "tiny-c", "bits": "auto", "data": "/nowhere.jsonl",
        "state-dir": str(tmp_path), "memory-gb": needs["int8"],
    }  # fmt: skip
    assert identify(config, deployed).spec.type_key == "tiny-c@int8"
    with pytest.raises(ConfigError, match="nf4-single"):
        compose("quick", ["types.0.bits=nf4-singel"])


def test_single_quantization_is_closer_to_the_weights(tmp_path):
    directory = str(save_backbone(tmp_path / "little"))
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    layers = {}
    for width in ("nf4", "nf4-single"):
        model = loading.load_backbone(BackboneSpec(directory, width), "cpu").model
        layers[width] = model.model.layers[0].mlp.up_proj.weight
        assert model(ids).logits.isfinite().all()
    assert layers["nf4"].quant_state.nested
    assert not layers["nf4-single"].quant_state.nested
    assert torch.equal(layers["nf4"].data, layers["nf4-single"].data)  # same codes, other scales
