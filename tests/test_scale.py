"""Hundreds of virtual clients: what is looked up once, how many messages are under way, what is told and kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from heterotune_flwr.config.schema import AlignmentConfig, DataConfig, MethodConfig, TypeConfig
from heterotune_flwr.data import partition, pools, sources
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.dema import kept
from heterotune_flwr.dema.maps import AlignmentResult
from heterotune_flwr.federation.identity import expand_types
from heterotune_flwr.tuning import state_cache

SMALL = DataConfig(examples_per_client=6, personal_test_examples=2)


def test_a_pool_is_not_hashed_or_sorted_anew_for_every_client(monkeypatch):
    client_examples(SMALL, 0, 50, 0)
    shared = partition._shares.cache_info().misses
    sorted_before = pools._answers.cache_info().misses
    hashed = []
    monkeypatch.setattr(sources.Example, "__hash__", lambda self: hashed.append(self) or 0)
    for client in range(50):
        assert len(client_examples(SMALL, client, 50, 0).train) == 6
    assert not hashed
    assert partition._shares.cache_info().misses == shared
    assert pools._answers.cache_info().misses == sorted_before


def test_a_pool_that_was_read_anew_is_another_one(tmp_path):
    path = tmp_path / "own.csv"
    data = dataclasses.replace(SMALL, name="own", train=str(path))
    for labels in (["a", "b"], ["b", "c", "d"]):
        path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels * 9)))
        assert sources.label_set(data) == labels


@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 4), (1,), (0, 0)])
def test_types_come_in_turn_until_each_has_its_clients(counts):
    types = [TypeConfig(str(index), clients=n) for index, n in enumerate(counts)]
    order = [int(item.backbone) for item in expand_types(types)]
    assert [order.count(index) for index in range(len(counts))] == list(counts)
    assert order[: sum(n > 0 for n in counts)] == [i for i, n in enumerate(counts) if n]


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


def test_the_disk_is_looked_through_after_enough_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HETEROTUNE_STATES_GB", "0.00064")
    monkeypatch.setattr(state_cache, "written", state_cache._Written())
    looked = []
    prune = state_cache.prune
    monkeypatch.setattr(state_cache, "prune", lambda *a, **k: looked.append(a) or prune(*a, **k))
    for number in range(100):  # 100 x 1,024 bytes; at the first and then every 10 kB
        key = f"{number:02x}" * 16
        state_cache.kept(
            key, 16, 16, torch.device("cpu"), lambda: torch.zeros(16, 16, dtype=torch.float32)
        )
        assert state_cache.usage()[1] <= 640_000 + 10_000 + 2000
    assert 8 <= len(looked) <= 12
    state_cache.forget_states()


def test_memory_counts_a_table_that_is_put_twice_once(monkeypatch):
    monkeypatch.setenv("HETEROTUNE_STATES_MEMORY_GB", "0.000003")
    memory = state_cache._Memory()
    for key in ("a", "b", "a", "b", "a"):
        memory.put(key, torch.zeros(250))
    assert memory.get("a") is not None
    assert memory.get("b") is not None
    memory.put("c", torch.zeros(250))
    memory.put("d", torch.zeros(250))
    assert [memory.get(key) is None for key in "abcd"] == [True, False, False, False]
