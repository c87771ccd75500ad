"""The second view of a text: what enters the first and the middle block, averaged over it, aligned like a slot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import CORES, with_maps
from tiny_backbones import LABELS

from heterotune_flwr.alignment.factor_checks import fault_of
from heterotune_flwr.alignment.factors import (
    alignment_factors,
    collect_view,
    principal_components,
    view_components,
    view_factors,
)
from heterotune_flwr.alignment.maps import compute_maps, join_type
from heterotune_flwr.alignment.public_texts import Anchor
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.channels.statistics.client import shared_latents
from heterotune_flwr.config.choices import check_choices
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.dema import read_maps
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.schema import AlignmentConfig, Config, MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.frozen_states import bare_view
from heterotune_flwr.tuning.task import make_task

TEXT = VIEWS["text"]


def test_a_text_is_the_means_of_its_first_and_middle_states_without_the_first_token(adapted):
    adapter, _, encoded = adapted
    found = bare_view(adapter, TEXT, encoded)
    with adapter.bare(), torch.no_grad():
        for index in (0, 5):
            ids = torch.tensor([encoded.inputs[index]])
            states = adapter.reader.body(input_ids=ids, output_hidden_states=True).hidden_states
            read = (states[0], states[2])  # 3 blocks: what enters the first and the last
            expected = torch.cat([part[0, 1:].mean(dim=0) for part in read])
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-4)


def test_both_sides_read_whole_texts_alike(directory, data):
    """What the maps are made from, and what they are applied to."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, list(LABELS), TrainConfig())
    examples = training_pool(data)[:9]
    adapter = with_maps(attach(backbone, replace(CORES, output=3), 3))
    found = bare_view(adapter, TEXT, task.encode(examples)).numpy()
    detach(backbone)
    read = collect_view(TEXT, backbone, [example.text for example in examples], data)
    np.testing.assert_allclose(found, read, rtol=1e-4, atol=1e-5)


def test_both_halves_of_the_view_weigh_the_same_whatever_their_scale():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(50, 8)).astype(np.float32) + 3
    alignment = AlignmentConfig(components=6)
    found = view_components(TEXT, states, alignment)
    scores = (states - found["text.mean"]) @ found["text.basis"].T
    np.testing.assert_allclose(scores, found["text.scores"], atol=1e-4)
    louder = states.copy()
    louder[:, 4:] *= 1000
    again = view_components(TEXT, louder, alignment)
    np.testing.assert_allclose(
        np.abs(again["text.scores"]), np.abs(found["text.scores"]), atol=1e-3
    )
    constant = np.concatenate([states[:, :4], np.ones((50, 4), np.float32)], axis=1)
    assert all(
        np.isfinite(part).all() for part in view_components(TEXT, constant, alignment).values()
    )


def factors_of(seed, rotation, count=60, width=12):
    """Two places of one type: the same hidden meaning seen through different matrices."""
    rng = np.random.default_rng(0)
    meaning, text = rng.normal(size=(count, 5)), rng.normal(size=(count, 5))
    own = np.random.default_rng(seed)
    factors = {"label_rows": own.normal(size=(3, width))}
    for place, hidden in (("slots.0", meaning), ("text", text)):
        states = hidden @ own.normal(size=(5, width)) + 0.01 * own.normal(size=(count, width))
        parts = principal_components((states + rotation).astype(np.float32), 8)
        factors |= {
            f"{place}.{n}": v for n, v in zip(("scores", "basis", "mean"), parts, strict=True)
        }
        factors[f"{place}.states"] = states + rotation
    return factors


def test_whole_texts_are_aligned_like_a_slot_and_a_late_type_joins():
    method = MethodConfig(latent=4, inner=2, output=3, views=["text"])
    alignment = AlignmentConfig(shrinkage=[0.01])
    factors = {"a": factors_of(1, 0.0), "b": factors_of(2, 3.0)}
    result = compute_maps(factors, alignment, method, ["x", "y", "z"])
    assert [len(quality) for quality in result.quality.values()] == [2, 2]
    assert min(min(quality) for quality in result.quality.values()) > 0.95
    late = factors_of(3, -1.0)
    joined, quality = join_type(result, late, method)
    assert min(quality) > 0.9
    for place in ("slots.0", "text"):
        seen = [
            of[f"{place}.states"] @ maps[f"{place}.map.down.weight"].T
            + maps[f"{place}.map.down.bias"]
            for of, maps in (
                (factors["a"], result.maps["a"]),
                (factors["b"], result.maps["b"]),
                (late, joined),
            )
        ]
        for other in seen[1:]:
            for column in range(4):
                assert np.corrcoef(seen[0][:, column], other[:, column])[0, 1] > 0.9
    without = replace(method, views=[])
    plain = compute_maps(factors, alignment, without, ["x", "y", "z"])
    for name, value in plain.maps["a"].items():
        np.testing.assert_array_equal(value, result.maps["a"][name])
    assert "text.map.down.weight" not in plain.maps["a"]
    for control in ("random_down", "random_maps", "rotated_basis"):
        broken = compute_maps(factors, replace(alignment, control=control), method, ["x", "y", "z"])
        name = "text.map.down.weight"
        changed = [
            key for key in "ab" if not np.allclose(broken.maps[key][name], result.maps[key][name])
        ]
        assert changed == (["b"] if control == "rotated_basis" else ["a", "b"])


def test_maps_of_texts_are_wanted_where_the_method_has_them(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = with_maps(attach(backbone, replace(CORES, output=3), 3))
    maps = read_maps(adapter.model)
    latent, width = adapter.method.latent, 2 * backbone.hidden
    texts = {
        "text.map.down.weight": np.ones((latent, width), np.float32),
        "text.map.down.bias": np.full(latent, 2.0, np.float32),
    }
    with pytest.raises(ExchangeError, match="do not fit"):
        adapter.load_maps({**maps, **texts})
    both = attach(backbone, replace(CORES, output=3, views=["text"]), 3)
    with pytest.raises(ExchangeError, match="do not fit"):
        both.load_maps(maps)
    both.load_maps({**maps, **texts})
    np.testing.assert_allclose(
        both.view_latents(TEXT, torch.ones(1, width)), np.full((1, latent), width + 2.0)
    )


def test_another_view_is_one_class_and_a_name(directory, data, monkeypatch):
    class Words:
        name, version, parts = "words", 1, 1

        def states(self, reader, lines):
            return reader.text_means(lines, (0,))

    monkeypatch.setitem(VIEWS, "words", Words())
    method = replace(CORES, output=3, views=["words", "text"])
    check_choices(Config(method=method))
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    texts = [f"public words {n} and {n % 7} more of them" for n in range(40)]
    alignment = AlignmentConfig(components=8, shrinkage=[0.01])
    public = (backbone, texts, alignment, data)
    places = [Anchor(text) for text in texts]
    factors = alignment_factors(backbone, places, alignment, data, LABELS, method.slots)
    for name in method.views:
        factors |= view_factors(VIEWS[name], *public)
        assert not fault_of(view_factors(VIEWS[name], *public), 1, VIEWS[name], 32, 3, False)
    maps = compute_maps({"a": factors, "b": factors}, alignment, method, LABELS).maps["a"]
    adapter = attach(backbone, method, 3)
    adapter.load_maps({name: value.astype(np.float32) for name, value in maps.items()})
    encoded = make_task(backbone, data, list(LABELS), TrainConfig()).encode(training_pool(data)[:5])
    both, alone = bare_view(adapter, TEXT, encoded), bare_view(adapter, VIEWS["words"], encoded)
    torch.testing.assert_close(alone, both[:, :32])
    assert shared_latents(adapter, encoded).shape == (5, 3 * method.latent)
