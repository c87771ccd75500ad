"""What a client keeps between rounds: its own tensors, and maps all its runs share."""

from __future__ import annotations

import numpy as np
import pytest

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.tuning import client_state
from heterotune_flwr.tuning.client_state import ClientStore


def test_the_state_before_the_last_round_is_kept(tmp_path, monkeypatch):
    store = ClientStore(tmp_path, "run", "client-0001")
    shapes = {"a": (1,)}

    def save(value, round):
        store.save({"a": np.full(1, value, np.float32)}, round)

    def held(before=None):
        loaded = store.load(shapes, before)
        return float(loaded["a"][0]) if loaded else None

    save(3.0, 3)  # first took part in round 3
    assert (held(), held(4), held(3), held(1)) == (3.0, 3.0, None, None)
    save(3.5, 3)
    assert (held(4), held(3)) == (3.5, None)
    save(5.0, 5)
    assert (held(), held(6), held(5), held(4), held(3)) == (5.0, 5.0, 3.5, 3.5, None)
    save(5.5, 5)
    assert (held(6), held(5)) == (5.5, 3.5)
    with monkeypatch.context() as crash:  # between the two steps of a save
        crash.setattr(client_state, "save_tensors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(7.0, 7)
    assert (held(), held(7)) == (5.5, 5.5)
    save(7.0, 7)
    assert (held(8), held(7), held(6)) == (7.0, 5.5, 5.5)
    save(6.0, 6)  # a server that goes on from an older checkpoint
    assert (held(7), held(6)) == (6.0, 5.5)
    save(7.0, 7)
    save(8.0, 8)
    with pytest.raises(ExchangeError, match=r"round 6 .*rounds 7, 8"):
        held(6)
    save(1.0, 1)  # the run begins anew: what was before round 1 is known, there was nothing
    assert (held(), held(2), held(1)) == (1.0, 1.0, None)
    assert list(store.path.parent.iterdir()) == [store.path]
    store.path.write_bytes(b"half")
    with pytest.raises(ExchangeError, match="remove it to start anew"):
        store.load(shapes)


def test_client_files(tmp_path):
    store = ClientStore(tmp_path, "run-1-heterotune-seed0", "client-0001")
    shapes = {"a": (2,), "b": (3,)}
    assert store.load(shapes) == {}
    store.save({"a": np.ones(2, np.float32), "c": np.ones(1, np.float32)}, round=3)
    assert list(store.load(shapes)) == ["a"]
    with pytest.raises(ExchangeError, match="another configuration"):
        store.load({"a": (4,)})
    maps = {"m": np.arange(4, dtype=np.float32)}
    digest = tensor_digest(maps)
    assert store.load_maps(digest) is None
    with pytest.raises(ExchangeError, match="not those"):
        store.save_maps({"m": maps["m"] + 1}, digest)
    store.save_maps(maps, digest)
    held = ClientStore(tmp_path, "other", "client-0002").load_maps(digest)
    assert held is not None
    assert np.array_equal(held["m"], maps["m"])
    for bad in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(ExchangeError, match="cannot name a file"):
            ClientStore(tmp_path, bad, "client-0001")
        with pytest.raises(ExchangeError, match="cannot name a file"):
            ClientStore(tmp_path, "run", bad)
    with pytest.raises(ExchangeError, match="not a SHA-256"):
        store.load_maps("../../etc/passwd")
