"""Kept states: what is held in memory and on disk, and when it goes."""

from __future__ import annotations

import os
import time

import torch

from heterotune_flwr.tuning import state_cache


def test_the_disk_is_looked_through_after_enough_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HETEROTUNE_STATES_GB", "0.00064")
    monkeypatch.setattr(state_cache, "written", state_cache.Written())
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
    memory = state_cache.Memory()
    for key in ("a", "b", "a", "b", "a"):
        memory.put(key, torch.zeros(250))
    assert memory.get("a") is not None
    assert memory.get("b") is not None
    memory.put("c", torch.zeros(250))
    memory.put("d", torch.zeros(250))
    assert [memory.get(key) is None for key in "abcd"] == [True, False, False, False]


def test_states_that_nobody_uses_go(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(state_cache, "pruned", set())
    state_cache.keep_in(tmp_path / "node")
    try:
        for key in ("aa" * 16, "bb" * 16):
            state_cache.kept(key, 2, 2, torch.device("cpu"), lambda: torch.zeros(2, 2))
        old = state_cache.states_path("aa" * 16)
        assert old.is_relative_to(tmp_path / "node" / "states")
        os.utime(old, (1, time.time() - 31 * 86400))
        state_cache.keep_in(tmp_path / "node")  # the process has looked already
        assert old.exists()
        state_cache.pruned.clear()  # another process
        state_cache.keep_in(tmp_path / "node")
        assert not old.exists()
        assert state_cache.states_path("bb" * 16).exists()
    finally:
        state_cache.keep_in(None)
        state_cache.forget_states()
