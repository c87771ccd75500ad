"""Updates that are put aside on disk: the same bits, read in parts, no file left."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.exchange import spill
from heterotune_flwr.exchange.spill import Spill
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import admission
from heterotune_flwr.federation.journal import Journal

HETEROTUNE = "heterotune_flwr.strategies.HeteroTune"
STRATEGIES = {
    "heterotune": {"_component_": HETEROTUNE},
    "directions": {
        "_component_": HETEROTUNE,
        "chain": [
            {"transform": "clip_to_median"},
            {"transform": "pcgrad"},
            {"transform": "cagrad"},
        ],
    },
    "robust": {"_component_": HETEROTUNE, "robust": {"rule": "multi_krum", "hostile": 1}},
    "within": {"_component_": "heterotune_flwr.strategies.WithinType", "robust": "median"},
    "fedit": {
        "_component_": "heterotune_flwr.strategies.FedIT",
        "method": {"kind": "lora", "lora_rank": 4},
    },
    "flora": {
        "_component_": "heterotune_flwr.strategies.FLoRA",
        "method": {"kind": "lora", "lora_rank": 4},
    },
    "scaffold": {
        "_component_": "heterotune_flwr.strategies.Scaffold",
        "train": {"optimizer": "sgd"},
    },
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_that_were_put_aside_give_the_same_bits(tmp_path, monkeypatch, name):
    """All in memory, some in a file, all in a file and read as they arrive; one client sends NaN."""

    def run(where):
        config = toy_config(tmp_path, (4, 4, 4), {name: STRATEGIES[name]}, rounds=2)
        toy = ToyFederation(config, nan={("client-0001", 1)})
        results = run_strategies(toy.grid(), config, Journal(tmp_path / where), "toy")
        banks = load_tensors(next((tmp_path / where / "banks").glob("*.safetensors")))
        return results["runs"][0], banks

    made = []
    real = Spill.put
    monkeypatch.setattr(Spill, "put", lambda *a: made.append(1) or real(*a))
    (one, bank), results = run("memory"), []
    assert not made
    for where, waiting, held in (("some", 10**9, 4000), ("none", 0, 0)):
        monkeypatch.setattr(admission, "WAITING", waiting)
        monkeypatch.setattr(spill, "IN_MEMORY", held)
        results.append(run(where))
        assert made
    assert one["refused"]["client-0001"] == {"tensors": 1}
    for other, same in results:
        assert other["refused"] == one["refused"]
        assert other["clients"] == one["clients"]
        assert same.keys() == bank.keys()
        assert all(np.array_equal(same[key], bank[key]) for key in bank)


def test_what_is_put_aside_is_read_in_parts_and_leaves_no_file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(i, 3)).astype(np.float32) for i in range(4)}
    kept = Spill(tmp_path).put(tensors, 2.5, "f")
    assert list(kept) == list(tensors)
    assert kept.size == 18
    for found in (kept.load(), {name: kept[name] for name in kept}):
        assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    part = kept.only(["t3", "t1"])
    assert (part.norm, part.fingerprint, part.size) == (None, None, 12)
    assert np.array_equal(part.load()["t1"], tensors["t1"])
    assert np.array_equal(
        part.flat(), np.concatenate([tensors[name].reshape(-1) for name in ("t3", "t1")])
    )
    assert np.array_equal(
        kept.flat(), np.concatenate([value.reshape(-1) for value in tensors.values()])
    )
    assert np.array_equal(kept.scaled(np.float32(0.3))["t2"], np.float32(0.3) * tensors["t2"])
    assert not list(tmp_path.glob("*"))
