"""What a dry run says a run will cost, against what is really attached and sent."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.exchange.packing import pack, payload_bytes
from heterotune_flwr.forecast import (
    forecast,
    packed_bytes,
    strategy_bytes,
    trained_shapes,
    type_facts,
)
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.adapters import attach, detach_all


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig(latent=8, inner=4, experts_global=4, output=6, slots=2),
        MethodConfig(latent=8, inner=4, output=6, core_rank=3),
        MethodConfig(latent=8, inner=0, output=6, core_rank=3, core_kind="lora", core_from=0.0),
        MethodConfig(kind="lora", lora_rank=4),
        MethodConfig(kind="lora", lora_rank=4, lora_core=True),
    ],
)
def test_shapes_foretold_are_those_that_are_attached(method):
    config = compose("quick", ["types=[{backbone: tiny-a, bits: fp32, clients: 2}]"])
    backbone = load_backbone(BackboneSpec("tiny-a", "fp32"), "cpu")
    adapter = attach(backbone, method, 6)
    try:
        assert trained_shapes(method, type_facts(config.types[0])) == adapter.shapes
    finally:
        detach_all()


@pytest.mark.parametrize("codec", ["bf16", "fp32", "int8", "nf4", "topk:0.1"])
def test_bytes_foretold_are_those_that_are_packed(codec):
    shapes = {"slots.0.gate.weight": (3, 70), "slots.0.gate.bias": (3,)}
    record = pack({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, codec)
    assert packed_bytes(shapes, codec) == payload_bytes(record)


def test_a_clients_own_tensors_do_not_travel_and_channels_are_told_apart():
    config = compose("quick", ["method.gate_scope=client", "run.compare=[heterotune,local_only]"])
    facts = [type_facts(entry) for entry in config.types]
    found = strategy_bytes(config, "heterotune", facts)
    plain = strategy_bytes(compose("quick"), "heterotune", facts)
    gate = 2 * 3 * (32 + 1)  # of three experts, in bf16
    for key, sizes in found["types"].items():
        assert 0 < plain["types"][key]["up"] - sizes["up"] - gate < 70  # and the tensors' names
    labels = len(label_set(config.data) or ())
    assert found["channels"]["predictions"] == 512 * labels
    nothing = {"up": 0, "down": 0}
    alone = strategy_bytes(config, "local_only", facts)["types"]
    assert all(sizes == nothing for sizes in alone.values())


def test_a_dry_run_is_told_in_words():
    config = compose("quick", ["run.dir=/somewhere"])
    text = "\n".join(forecast(config))
    assert "rows go to 6 clients" in text
    assert "tiny-c@nf4: 2 clients; weights 5.0 MB" in text
    assert "heterotune: 3.3 kB up, 3.3 kB down" in text
    assert "once, for the alignment: tiny-a@bf16" in text


def test_a_dry_run_needs_none_of_the_large_libraries(tmp_path):
    script = """
import sys
sys.argv = ["heterotune", "run", "quick", "--dry-run"]
from heterotune_flwr.entry import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "bitsandbytes", "peft", "scipy", "datasets", "ray"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "memory on this machine" in done.stdout
