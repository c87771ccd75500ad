"""A node of a type that the run does not know yet joins at a resume: known types keep their maps, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS as SPECS

from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.federation.kept_maps import KeptMaps
from heterotune_flwr.reporting.tables import final_table
from heterotune_flwr.strategies import HeteroTune

SMALL, MIDDLE, LARGE = "small@fp32", "middle@fp32", "large@fp32"


def start(config, federation, places, resuming=False, rounds=None):
    """Run with the nodes at some places of the list, one of each type."""
    config.server.rounds = rounds or config.server.rounds
    nodes = [{"partition-id": i, "num-partitions": 3} for i in places]
    grid = InProcessGrid(federation.app(), nodes)
    journal = Journal(Path(config.run.dir))
    return run_strategies(grid, config, journal, "toy-0", resuming)


def two_types(tmp_path, name="heterotune", rounds=3):
    """A run of the first two types that has ended."""
    config = toy_config(tmp_path, (1, 1, 1), {name: SPECS[name]}, rounds=rounds, min_clients=2)
    federation = ToyFederation(config)
    start(config, federation, (0, 1))
    return config, federation


def kept(config):
    (path,) = (Path(config.run.dir) / "maps").iterdir()
    return load_state(path), path


def the_run(config):
    return {
        path: path.read_bytes()
        for folder in ("maps", "checkpoints", "banks")
        for path in (Path(config.run.dir) / folder).rglob("*.safetensors")
    }


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_new_type_joins_every_strategy(tmp_path, name):
    config, federation = two_types(tmp_path, name)
    results = start(config, federation, (0, 1, 2), True, rounds=6)
    (run,) = results["runs"]
    assert set(run["types"]) == {SMALL, MIDDLE, LARGE}
    clients = [entry["clients"] for entry in run["rounds"] if entry["event"] == "round"]
    assert clients == [2, 2, 2, 3, 3, 3]
    assert "large" in final_table(results, tmp_path)


def test_known_types_keep_their_maps_and_the_new_ones_are_kept_too(tmp_path):
    config, federation = two_types(tmp_path)
    before, _ = kept(config)
    start(config, federation, (0, 1, 2), True, rounds=5)
    after, _ = kept(config)
    for key in (SMALL, MIDDLE):
        for name, value in before["tensors"][key].items():
            np.testing.assert_array_equal(value, after["tensors"][key][name])
    assert set(after["tensors"]) == {SMALL, MIDDLE, LARGE}
    assert [c for kind, c in (e[:2] for e in federation.log if e[0] == "align")].count(
        "client-0002"
    ) == 1
    aligned = [
        e for e in read_events(Path(config.run.dir) / "rounds.jsonl") if e["event"] == "align"
    ]
    assert [e["joined"] for e in aligned] == [[], [LARGE]]
    start(config, federation, (0, 2), True, rounds=6)  # one of the first is away: nothing is lost
    start(config, federation, (0, 1, 2), True, rounds=7)
    final, _ = kept(config)
    for key, maps in after["tensors"].items():
        for name, value in maps.items():
            np.testing.assert_array_equal(value, final["tensors"][key][name])


def test_the_new_type_uses_the_bank_at_once(tmp_path):
    config, federation = two_types(tmp_path, rounds=12)
    (run,) = start(config, federation, (0, 1, 2), True, rounds=13)["runs"]
    name = "slots.0.experts.global.0.up.weight"
    sent = {c: federation.received[f"client-000{c}", 13].tensors[name] for c in range(3)}
    np.testing.assert_array_equal(sent[0], sent[2])
    assert np.abs(sent[2]).max() > 0
    maps = federation.received["client-0002", 13].maps_digest
    assert maps in federation.maps["client-0002"]
    losses = {key: entry["global_accuracy_mean"] for key, entry in run["types"].items()}
    assert losses[LARGE] > 1 / 6 + 0.1


def test_in_the_type_phase_a_new_type_begins_with_the_last_shared_bank(tmp_path):
    config, federation = two_types(tmp_path, "phases", rounds=4)
    start(config, federation, (0, 1, 2), True, rounds=5)
    state = load_state(
        Path(config.run.dir) / "checkpoints" / "phases-seed0" / "round-000005.safetensors"
    )
    assert state["memory"]["personalized"]
    assert set(state["shared"]) >= {f"type/{key}" for key in (SMALL, MIDDLE, LARGE)}
    name = "slots.0.experts.global.0.up.weight"
    first = federation.received["client-0002", 5].tensors[name]
    np.testing.assert_allclose(first, state["shared"]["global"][name], rtol=1e-2, atol=1e-4)
    assert not np.array_equal(first, state["shared"][f"type/{LARGE}"][name])
    assert not np.array_equal(first, federation.received["client-0000", 5].tensors[name])


def test_a_type_that_cannot_join_is_left_out_and_the_run_goes_on(tmp_path):
    config, federation = two_types(tmp_path)
    state, path = kept(config)
    for field in ("latents", "shrinkage"):  # as older programs wrote it
        del state[field]
    save_state(path, state)
    before = the_run(config)
    (run,) = start(config, federation, (0, 1, 2), True, rounds=5)["runs"]
    assert "older program" in left_out(config)["client-0002"]
    assert set(run["types"]) == {SMALL, MIDDLE}
    assert {p: v for p, v in the_run(config).items() if p.parent.name == "maps"} == {
        p: v for p, v in before.items() if p.parent.name == "maps"
    }


def left_out(config):
    events = read_events(Path(config.run.dir) / "rounds.jsonl")
    return {e["client_id"]: e["reason"] for e in events if e["event"] == "left_out"}


def test_a_type_whose_factors_cannot_be_had_is_left_out_until_they_can(tmp_path):
    config, federation = two_types(tmp_path)
    before = the_run(config)
    federation.fail.add(("client-0002", 0))
    (run,) = start(config, federation, (0, 1, 2), True, rounds=5)["runs"]
    assert "no memory left" in left_out(config)["client-0002"]
    assert set(run["types"]) == {SMALL, MIDDLE}
    for path, value in before.items():
        assert path.parent.name != "maps" or path.read_bytes() == value
    federation.fail.clear()
    (run,) = start(config, federation, (0, 1, 2), True, rounds=6)["runs"]
    assert set(run["types"]) == {SMALL, MIDDLE, LARGE}


def test_other_weights_under_a_known_name_are_refused(tmp_path, monkeypatch):
    config, federation = two_types(tmp_path)
    state, path = kept(config)
    state["fingerprints"][SMALL] = "others"
    save_state(path, state)
    before = the_run(config)
    with pytest.raises(FederationError, match=r"client-0000.*small@fp32"):
        start(config, federation, (0, 1), True, rounds=5)
    assert the_run(config) == before


def test_maps_are_saved_only_when_the_checkpoint_fits(tmp_path, monkeypatch):
    config, federation = two_types(tmp_path)
    before = the_run(config)
    monkeypatch.setattr(HeteroTune, "load_state_dict", lambda self, state: 1 / 0)
    with pytest.raises(FederationError, match="ZeroDivisionError"):
        start(config, federation, (0, 1, 2), True, rounds=5)
    assert the_run(config) == before


def test_functionals_of_a_vocabulary_are_those_of_the_symbols_it_knows():
    values = np.arange(6.0).reshape(3, 2)
    found = KeptMaps({}, {}, {}, [0.1], {"functionals": values})
    own = np.array([True, False, True])
    np.testing.assert_array_equal(found.known(own).anchor_latents["functionals"], values[[0, 2]])
