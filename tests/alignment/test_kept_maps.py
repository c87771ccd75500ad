"""Maps that were computed are kept, and taken for equal factors and settings alone."""

from __future__ import annotations

import numpy as np

from heterotune_flwr.alignment import kept
from heterotune_flwr.alignment.maps import AlignmentResult
from heterotune_flwr.schema import (
    AlignmentConfig,
    MethodConfig,
)


def test_maps_are_computed_once_for_equal_factors_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    factors = {"a": {"x": rng.normal(size=(3, 2)).astype(np.float32)}}
    made = AlignmentResult(factors, {"a": [0.5]}, [0.1], 2, {"z": rng.normal(size=4)})
    calls = []

    def compute():
        calls.append(1)
        return made

    given = (factors, AlignmentConfig(), MethodConfig(), ["l"], 0)
    for _ in range(2):
        found = kept.kept_maps(kept.maps_path(*given), compute)
        assert np.array_equal(found.anchor_latents["z"], made.anchor_latents["z"])
        assert np.array_equal(found.maps["a"]["x"], factors["a"]["x"])
        assert (found.quality, found.shrinkage, found.output_width) == ({"a": [0.5]}, [0.1], 2)
    assert len(calls) == 1
    others = [
        ({"a": {"x": factors["a"]["x"] + 1e-6}}, *given[1:]),
        (factors, AlignmentConfig(weighting=1.0), *given[2:]),
        (*given[:3], ["m"], 0),
        (*given[:4], 1),
    ]
    assert len({kept.maps_path(*given), *(kept.maps_path(*other) for other in others)}) == 5
    kept.maps_path(*given).write_bytes(b"torn")
    assert kept.kept_maps(kept.maps_path(*given), compute).output_width == 2
    assert len(calls) == 2
