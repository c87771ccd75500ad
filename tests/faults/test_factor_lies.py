"""Clients that lie about their backbone's public factors: their type pays at most, and nothing of it is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_federation import answering, describing, run, toy_spec
from toy_federation import ToyFederation, toy_config
from toy_model import Backbone

from heterotune_flwr.alignment.factor_checks import fault_of, same_backbone
from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation import factors_asked
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal, read_events
from heterotune_flwr.protocol.queries import AlignReply

HONEST = {name: value.astype(np.float32) for name, value in Backbone("small").factors().items()}
rng = np.random.default_rng(0)


def each(change):
    return lambda factors: {name: change(value) for name, value in factors.items()}


def one(name, change):
    """Of one tensor, where it is asked for."""

    def changed(factors):
        return {**factors, **({name: change(factors[name])} if name in factors else {})}

    return changed


#: What is wrong by itself.
FAULTY = {
    "none": lambda factors: {},
    "no labels": lambda factors: {n: v for n, v in factors.items() if n != "label_rows"},
    "nan": each(lambda value: value * np.nan),
    "inf": one("label_rows", lambda value: value + np.inf),
    "1e30": each(lambda value: value * 1e30),
    "zeros": each(np.zeros_like),
    "no rows": each(lambda value: value[:0]),
    "flat": each(lambda value: value.reshape(-1)),
    "numbers": each(lambda value: value.reshape(-1)[0]),
    "half the width": one("slots.0.basis", lambda value: value[:, ::2]),
    "other width": lambda factors: Backbone("large").factors(),
    "one class": one("label_rows", lambda value: value[:1]),
}
#: What only another client's answer tells.
WRONG = {
    "random": each(lambda value: rng.normal(size=value.shape)),
    "turned scores": one("slots.0.scores", lambda v: v @ np.linalg.qr(rng.normal(size=(16, 16)))[0]),
    "turned basis": one("slots.0.basis", lambda v: np.linalg.qr(rng.normal(size=(16, 16)))[0] @ v),
    "other order": one("slots.0.scores", lambda value: value[::-1]),
    "swapped labels": one("label_rows", lambda value: value[::-1]),
    "larger labels": one("label_rows", lambda value: 2 * value),
    "other place": one("slots.0.mean", lambda value: value + 5.0),
    "small components": one("slots.0.scores", lambda v: np.hstack([v[:, :4], v[::-1, 4:]])),
}  # fmt: skip


def aligning(change, liars=("client-0000",), type_key=None):
    """``change``: honest factors -> others; ``type_key``: what the liars call their type."""

    def tell(content):
        told = AlignReply.from_content(content)
        return replace(told, factors=change(told.factors)).to_content("fp32")

    def prepare(federation, grid):
        answering("align", tell, liars)(federation, grid)
        if type_key:
            other = {"type_key": type_key, "fingerprint": "e" * 16}
            describing(lambda told: replace(told, **other), liars)(federation, grid)

    return prepare


def play(change=None, clients=(2, 2, 2), **how):
    prepare = aligning(change, **how) if change else None
    return run(toy_spec("heterotune"), clients, prepare=prepare, rounds=1, wait_seconds=0.1)


def same(a, b):
    for name, value in a.strategy.shared_tensors().items():
        np.testing.assert_array_equal(value, b.strategy.shared_tensors()[name])
    return a.loss() == b.loss()


@pytest.mark.parametrize("name", sorted(FAULTY))
def test_faulty_factors_are_refused_and_the_next_clients_are_used(name):
    ended = play(FAULTY[name])
    refused = ended.of("factors_refused")
    assert refused
    for event in refused:
        assert event["reason"].startswith("client-0000: its factors cannot be used")
    assert {e["type"] for e in ended.of("unchecked")} == {"small@fp32"}
    assert same(ended, play())


@pytest.mark.parametrize("name", sorted(WRONG))
def test_of_two_that_disagree_neither_is_believed(name):
    assert not fault_of(WRONG[name](HONEST), 1, None, 24, 6, False)
    ended = play(WRONG[name])
    assert {e["type"] for e in ended.of("apart")} == {"small@fp32"}
    assert [group for group in ended.strategy.state if group != "global"] == ["type/small@fp32"]
    # The others' maps are made as if the type were not there.
    alone = play(clients=(0, 2, 2)).strategy.maps.tensors
    for key in ("middle@fp32", "large@fp32"):
        for part, value in alone[key].items():
            np.testing.assert_allclose(value, ended.strategy.maps.tensors[key][part], atol=1e-3)


@pytest.mark.parametrize("name", sorted(WRONG))
def test_of_three_two_are_right(name):
    ended = play(WRONG[name], (3, 2, 2))
    assert not ended.of("apart")
    assert not ended.of("unchecked")
    assert same(ended, play(clients=(3, 2, 2)))


def test_a_pair_that_agrees_is_looked_for_among_some():
    ended = play(WRONG["random"], (5, 2, 2), liars=("client-0000", "client-0003", "client-0006"))
    assert not ended.of("apart")
    assert same(ended, play(clients=(5, 2, 2)))
    assert factors_asked.MOST_ASKED == 5


@pytest.mark.parametrize("name", ["none", "nan", "no rows"])
def test_a_new_type_that_lies_is_left_out(name):
    ended = play(FAULTY[name], liars=("client-0004",), type_key="evil@fp32")
    assert [e["client_id"] for e in ended.of("left_out")] == ["client-0004"]
    assert "evil@fp32" not in ended.strategy.roster.type_keys


def test_a_new_type_that_fits_nobody_has_no_say_in_the_others_maps():
    ended = play(WRONG["random"], liars=("client-0004",), type_key="evil@fp32")
    assert "type/evil@fp32" in ended.strategy.state
    honest = play().strategy.maps.tensors
    for key, maps in honest.items():
        for part, value in maps.items():
            np.testing.assert_array_equal(value, ended.strategy.maps.tensors[key][part])


def test_a_new_type_that_read_other_anchors_is_left_out():
    half = each(lambda value: value[:150] if len(value) == 300 else value)
    ended = play(half, liars=("client-0004",), type_key="evil@fp32")
    (left,) = ended.of("left_out")
    assert "has read 150 anchors, the others 300" in left["reason"]


def test_a_run_of_nobody_ends_with_the_reason():
    everybody = tuple(f"client-000{n}" for n in range(6))
    with pytest.raises(FederationError, match=r"could be aligned; .* not finite"):
        play(FAULTY["nan"], liars=everybody)


def noise(size):
    def add(value):
        value = np.asarray(value, np.float32)
        return value + size * value.std() * np.random.default_rng(1).normal(size=value.shape)

    return each(add)


def test_what_honest_processors_differ_by_is_the_same_backbone():
    turn = np.diag(np.where(np.arange(16) % 3, 1.0, -1.0))
    signs = {
        **HONEST,
        "slots.0.scores": HONEST["slots.0.scores"] @ turn,
        "slots.0.basis": turn @ HONEST["slots.0.basis"],
    }
    assert same_backbone(HONEST, signs)
    assert same_backbone(HONEST, noise(0.01)(HONEST))
    assert not same_backbone(HONEST, noise(0.3)(HONEST))
    assert not same_backbone(HONEST, Backbone("middle").factors())


def cached(tmp_path, change=None, clients=(2, 2, 2)):
    """A run with the server's cache; mean accuracy, and of which types it asked for factors."""
    spec = toy_spec("heterotune")
    config = toy_config(tmp_path, clients, {"heterotune": spec})
    config.run.dir = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
    config.alignment.cache = True
    federation = ToyFederation(config)
    grid: InProcessGrid = federation.grid()
    if change:
        aligning(change)(federation, grid)
    journal = Journal(Path(config.run.dir))
    (result,) = run_strategies(grid, config, journal, "toy-0")["runs"]
    asked = [e["types"] for e in read_events(journal.path) if e["event"] == "aligning"]
    return result["overall"]["global_accuracy_mean"], sorted(
        {key for keys in asked for key in keys}
    )


@pytest.mark.parametrize("name", ["random", "swapped labels"])
def test_a_liar_leaves_nothing_in_the_cache(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "honest"))
    honest, _ = cached(tmp_path)
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    cached(tmp_path, WRONG[name])
    after, asked = cached(tmp_path)
    assert asked == ["small@fp32"]  # the others' were agreed on, and kept
    assert after == honest
    assert cached(tmp_path) == (honest, [])


def test_what_one_client_alone_says_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    cached(tmp_path, clients=(1, 2, 2))
    assert cached(tmp_path, clients=(1, 2, 2))[1] == ["small@fp32"]
    monkeypatch.setattr("heterotune_flwr.federation.maps_service.is_simulation", lambda grid: True)
    cached(tmp_path, clients=(1, 2, 2))
    assert cached(tmp_path, clients=(1, 2, 2))[1] == []  # of this machine's own simulation it is
