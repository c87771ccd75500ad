"""Names, shapes and first values of the bank; numpy only."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from heterotune_flwr.dema.bank import bank_shapes, initial_tensors, part_of, slot_of
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.seeds import generator

METHOD = MethodConfig(slots=2, latent=8, inner=5, experts_global=4)


def test_shapes_are_the_contract() -> None:
    shapes = bank_shapes(METHOD, output=6)
    assert shapes["slots.0.experts.global.1.down.weight"] == (5, 8)
    assert shapes["slots.1.experts.global.2.down.bias"] == (5,)
    assert shapes["slots.1.experts.global.3.up.weight"] == (6, 5)
    assert shapes["slots.0.gate.weight"] == (4, 8)
    assert shapes["slots.0.gate.bias"] == (4,)
    assert len(shapes) == 2 * (4 * 3 + 2)


def test_bytes_of_the_measured_setting() -> None:
    """METHOD section 5: r=128, q=32, K=1, E=3 is 49 kB in bf16, whatever the backbone."""
    shapes = bank_shapes(MethodConfig(), output=128)
    numbers = sum(int(np.prod(s)) for name, s in shapes.items() if part_of(name) == "expert")
    assert numbers == 3 * (128 * 32 + 32 + 32 * 128)
    assert 2 * numbers == 49_344


def test_part_and_slot_of_every_name() -> None:
    names = bank_shapes(METHOD, output=6)
    assert {part_of(name) for name in names} == {"expert", "gate"}
    assert {slot_of(name) for name in names} == {0, 1}
    assert part_of("lora.model.layers.0.mlp.up_proj.A") == "lora"
    assert part_of("cores.model.layers.0.mlp.up_proj.R") == "core"
    assert part_of("sub.lm_head.weight") == "sub"
    assert slot_of("lora.model.layers.3.mlp.up_proj.A") == 0


@pytest.mark.parametrize(
    "name",
    ["", "slots.0", "slots.0.map.down.weight", "slots.0.experts.private.0.up.weight", "x.y.z"],
)
def test_other_names_are_of_no_part(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a trainable tensor"):
        part_of(name)


def test_first_values_depend_on_seed_and_name_alone() -> None:
    shapes = bank_shapes(METHOD, output=6)
    first = initial_tensors(shapes, seed=4)
    again = initial_tensors(dict(reversed(list(shapes.items()))), seed=4)
    other = initial_tensors(shapes, seed=5)
    for name, value in first.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again[name])
    name = "slots.0.experts.global.0.down.weight"
    assert not np.array_equal(first[name], other[name])


def test_first_values_are_pinned() -> None:
    """Server and clients of different versions must draw the same bank."""
    drawn = initial_tensors({"slots.0.experts.global.0.down.weight": (1, 4)}, seed=0)
    expected = [-0.5257126, 0.33047056, -0.401685, -0.70058817]
    value = drawn["slots.0.experts.global.0.down.weight"][0]
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_experts_differ_and_start_silent() -> None:
    values = initial_tensors(bank_shapes(METHOD, output=6), seed=0)
    first, second = (values[f"slots.0.experts.global.{e}.down.weight"] for e in (0, 1))
    assert not np.allclose(first, second)
    for name, value in values.items():
        assert value.any() == name.endswith("down.weight"), name


def test_spread_of_first_values() -> None:
    """Uniform in +-sqrt(3 / fan_in): standard deviation 1 / sqrt(fan_in)."""
    values = initial_tensors({"a.down.weight": (300, 48), "lora.m.A": (300, 27)}, seed=0)
    for name, fan_in in (("a.down.weight", 48), ("lora.m.A", 27)):
        bound = np.sqrt(3 / fan_in)
        assert 0.98 * bound < np.abs(values[name]).max() <= bound
        assert values[name].std() == pytest.approx(1 / np.sqrt(fan_in), rel=0.02)


def test_named_streams_are_independent() -> None:
    draws = {generator(seed, name).random() for seed in (0, 1) for name in ("a", "b", "0:a")}
    assert len(draws) == 6


def test_bank_needs_no_torch() -> None:
    """The server imports it where torch may be absent."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from heterotune_flwr.dema.bank import initial_tensors\n"
        "from heterotune_flwr import dema\n"
        "print('peft' in sys.modules, 'DeMAConfig' in dir(dema) or 'DeMAConfig' in dema.__all__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
