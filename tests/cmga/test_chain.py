"""CMGA against closed forms and properties: what the chain claims, it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heterotune_flwr.cmga import (
    GUARDED_CHAIN,
    MEAN_CHAIN,
    Member,
    build_chain,
    make_updates,
    min_norm_weights,
)
from heterotune_flwr.cmga.base import gram
from heterotune_flwr.cmga.server_optimizers import KINDS
from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.exchange.trees import load_state, save_state

DIMENSION = 12


def members(seed: int, types: int, per_type: int, spread: float = 1.0) -> list[Member]:
    """Random clients; types differ in scale, clients in examples."""
    rng = np.random.default_rng(seed)
    found = []
    for t in range(types):
        common = rng.normal(size=DIMENSION) * 10.0 ** rng.uniform(-2, 2)
        for c in range(per_type):
            noise = spread * np.abs(common).max() * rng.normal(size=DIMENSION)
            examples = float(rng.integers(1, 100))
            found.append(Member(f"client-{t}-{c}", f"type-{t}", common + noise, examples))
    return found


def run(chain_spec, rounds, seed=0):
    """Feed rounds of members through a chain; return the last state and result."""
    chain = build_chain(chain_spec)
    state = chain.init()
    for number, clients in enumerate(rounds, start=1):
        result, state = chain.update(make_updates(clients, number, seed), state)
    return state, result


seeds = st.integers(0, 2**32 - 1)
shapes = {"seed": seeds, "types": st.integers(1, 5), "per_type": st.integers(1, 4)}


@given(**shapes)
@settings(max_examples=60, deadline=None)
def test_order_of_clients_does_not_matter_to_the_last_bit(seed, types, per_type):
    clients = members(seed, types, per_type)
    shuffled = [clients[i] for i in np.random.default_rng(seed).permutation(len(clients))]
    _, one = run(GUARDED_CHAIN, [clients, clients])
    _, other = run(GUARDED_CHAIN, [shuffled, clients])
    assert np.array_equal(one.direction, other.direction)


@given(factor=st.sampled_from([1e-6, 1e-2, 3.0, 1e5]), **shapes)
@settings(max_examples=60, deadline=None)
def test_scaling_all_updates_of_one_type_keeps_the_direction(seed, types, per_type, factor):
    rounds = [members(seed + i, types, per_type, 0.3) for i in range(3)]
    scaled = [
        [
            Member(m.key, m.type_key, m.vector * factor, m.examples)
            if m.type_key == "type-0"
            else m
            for m in clients
        ]
        for clients in rounds
    ]
    _, one = run(GUARDED_CHAIN, rounds)
    _, other = run(GUARDED_CHAIN, scaled)
    a, b = (v.direction / np.linalg.norm(v.direction) for v in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-6)


@given(seed=seeds, types=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_zero_updates_make_no_nan_and_no_step(seed, types):
    zeros = [
        Member(m.key, m.type_key, np.zeros(DIMENSION), m.examples) for m in members(seed, types, 2)
    ]
    _, result = run(GUARDED_CHAIN, [zeros, zeros])
    assert np.array_equal(result.direction, np.zeros(DIMENSION))
    # One silent type among working ones, before and after it worked.
    working = members(seed, types + 1, 2)
    some = [z if z.type_key == "type-0" else w for z, w in zip(zeros[:2], working[:2], strict=True)]
    _, result = run(GUARDED_CHAIN, [working, some + working[2:], working])
    assert np.isfinite(result.direction).all()
    assert np.linalg.norm(result.direction) > 0


@given(seed=seeds, types=st.integers(2, 6), per_type=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_every_type_descends(seed, types, per_type):
    """The guard's claim: after the whole chain <d, g_m> >= 0 for every type m."""
    clients = members(seed, types, per_type, 0.5)
    _, result = run(GUARDED_CHAIN, [clients])
    for member in result.types:
        product = float(result.direction @ member.vector)
        scale = np.linalg.norm(result.direction) * np.linalg.norm(member.vector)
        assert product >= -1e-7 * max(scale, 1e-300)


def test_plain_mean_lacks_that_guarantee_so_the_property_can_fail():
    clients = [
        Member("a", "A", np.array([10.0, 0.0]), 1.0),
        Member("b", "B", np.array([-1.0, 1.0]), 1.0),
    ]
    _, mean = run(MEAN_CHAIN, [clients])
    assert mean.direction @ clients[1].vector < 0
    _, aligned = run(GUARDED_CHAIN, [clients])
    assert aligned.direction @ clients[1].vector >= 0
    assert aligned.direction @ clients[0].vector >= 0


def test_guard_works_alone_where_pairwise_projection_is_not_enough():
    rng = np.random.default_rng(0)
    guarded = [{"transform": "within_type_mean"}, {"transform": "combine", "weights": "examples"}]
    bare = [guarded[0], {**guarded[1], "guard": False}]
    violated = 0
    for _ in range(50):
        clients = [Member(str(i), str(i), rng.normal(size=4), 10.0**i) for i in range(4)]
        _, without = run(bare, [clients])
        _, result = run(guarded, [clients])
        violated += min(float(without.direction @ m.vector) for m in clients) < 0
        for member in clients:
            norm = np.linalg.norm(result.direction) * np.linalg.norm(member.vector)
            assert result.direction @ member.vector >= -1e-7 * norm
    assert violated > 25


@given(**shapes)
@settings(max_examples=60, deadline=None)
def test_mean_chain_is_the_weighted_mean(seed, types, per_type):
    clients = members(seed, types, per_type)
    _, result = run(MEAN_CHAIN, [clients])
    total = sum(m.examples for m in clients)
    oracle = sum(m.vector * m.examples for m in clients) / total
    np.testing.assert_allclose(result.direction, oracle, rtol=1e-9, atol=1e-9)


@given(seed=seeds, per_type=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_one_type_alone_gives_its_weighted_mean(seed, per_type):
    clients = members(seed, 1, per_type)
    _, result = run(GUARDED_CHAIN, [clients])
    np.testing.assert_allclose(result.direction, result.reference, rtol=1e-9, atol=1e-12)


def test_without_conflict_the_chain_is_the_mean_of_unit_updates_at_the_mean_norm():
    clients = [
        Member("a", "A", np.array([3.0, 0.0, 0.0]), 1.0),
        Member("b", "B", np.array([0.0, 5.0, 0.0]), 1.0),
        Member("c", "C", np.array([0.0, 0.0, 1.0]), 2.0),
    ]
    _, result = run(GUARDED_CHAIN, [clients])
    reference = np.linalg.norm(np.array([3.0, 5.0, 2.0]) / 4)
    np.testing.assert_allclose(result.direction, np.ones(3) / np.sqrt(3) * reference)
    assert result.log["conflict_rate"] == 0.0


def test_conflicting_pair_is_projected_as_pcgrad_says():
    a, b = np.array([1.0, 0.0]), np.array([-1.0, 1.0]) / np.sqrt(2)
    clients = [Member("a", "A", a, 1.0), Member("b", "B", b, 1.0)]
    _, result = run(GUARDED_CHAIN, [clients])
    step = (a - (a @ b) * b) + (b - (a @ b) * a)
    step *= np.linalg.norm((a + b) / 2) / np.linalg.norm(step)
    np.testing.assert_allclose(result.direction, step, atol=1e-12)
    assert result.log["conflict_rate"] == 1.0
    assert result.log["cosine_before"]["A|B"] == pytest.approx(-1 / np.sqrt(2))


def test_exactly_opposite_types_do_not_move():
    vector = np.array([1.0, 2.0])
    clients = [Member("a", "A", vector, 1.0), Member("b", "B", -vector, 1.0)]
    _, result = run(GUARDED_CHAIN, [clients])
    np.testing.assert_allclose(result.direction, 0.0, atol=1e-12)


def test_noise_only_type_loses_weight_and_no_type_exceeds_the_cap():
    rng = np.random.default_rng(3)
    signal = rng.normal(size=400)

    def clients():
        found = []
        for t in range(4):
            for c in range(6):
                noise = rng.normal(size=400)
                vector = noise if t == 3 else signal + noise
                found.append(Member(f"{t}-{c}", f"type-{t}", vector, 1.0))
        return found

    _, result = run(GUARDED_CHAIN, [clients() for _ in range(6)])
    assert result.weights["type-3"] < 0.5 * result.weights["type-0"]
    assert sum(result.weights.values()) == pytest.approx(1.0)
    assert max(result.weights.values()) <= 0.5


def test_reliability_against_spearman_brown_and_for_types_without_evidence():
    a, b = np.array([1.0, 0.0, 0.0]), np.array([0.6, 0.8, 0.0])
    clients = [
        Member("a1", "A", a, 1.0),
        Member("a2", "A", b, 1.0),
        Member("b1", "B", np.eye(3)[2], 1.0),
    ]
    _, result = run(GUARDED_CHAIN, [clients])
    # Two clients with cosine 0.6: one is worth 0.6, their mean 2 * 0.6 / 1.6.
    assert result.reliability["A"] == pytest.approx(0.75)
    assert result.reliability["B"] == pytest.approx(0.6)  # one client, as good as the others'
    rng = np.random.default_rng(0)
    signal = rng.normal(size=3000)
    many = [Member(str(i), "A", signal + rng.normal(size=3000), 1.0) for i in range(8)]
    _, result = run(GUARDED_CHAIN, [many] * 3)
    assert result.reliability["A"] == pytest.approx(8 * 0.5 / (1 + 7 * 0.5), abs=0.02)


def test_absent_type_contributes_nothing_and_returns_with_less_weight():
    both = [Member("a", "A", np.eye(3)[0], 1.0), Member("b", "B", np.eye(3)[1], 1.0)]
    third = [*both, Member("c", "C", np.eye(3)[2], 1.0)]
    chain = build_chain(GUARDED_CHAIN)
    _, state = chain.update(make_updates(third, 1), chain.init())
    for number in range(2, 6):
        result, state = chain.update(make_updates(both, number), state)
        assert result.direction[2] == 0.0
    result, _ = chain.update(make_updates(third, 6), state)
    assert result.weights["C"] == pytest.approx(0.9**4 * result.weights["A"])


def test_min_norm_weights_against_the_closed_form_of_two_vectors():
    rng = np.random.default_rng(1)
    for _ in range(30):
        a, b = rng.normal(size=(2, 5))
        share = float(np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1))
        found = min_norm_weights(gram([Member("a", "a", a, 1.0), Member("b", "b", b, 1.0)]))
        np.testing.assert_allclose(found, [share, 1 - share], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_server_optimizers_against_their_formula(kind):
    spec = [*MEAN_CHAIN, {"transform": "server_opt", "kind": kind, "learning_rate": 0.5}]
    rng = np.random.default_rng(0)
    rounds = [[Member("a", "A", rng.normal(size=3), 1.0)] for _ in range(4)]
    _, result = run(spec, rounds)
    for i in range(3):  # number by number, as the papers write it
        m, v, tau = 0.0, 1e-3**2, 1e-3
        for clients in rounds:
            d = clients[0].vector[i]
            m = {"sgd": d, "momentum": 0.9 * m + d}.get(kind, 0.9 * m + 0.1 * d)
            v = {
                "adam": 0.99 * v + 0.01 * d**2,
                "yogi": v - 0.01 * d**2 * (1 if v > d**2 else -1),
                "adagrad": v + d**2,
            }.get(kind, v)
        expected = m if kind in ("sgd", "momentum") else m / (v**0.5 + tau)
        assert result.direction[i] == pytest.approx(0.5 * expected)


def test_state_survives_saving_and_continues_bit_for_bit(tmp_path):
    spec = [*GUARDED_CHAIN[:-1], {"transform": "server_opt", "kind": "adam"}]
    chain = build_chain(spec)
    state = chain.init()
    for number in range(1, 4):
        _, state = chain.update(make_updates(members(number, 3, 2), number), state)
    save_state(tmp_path / "state.safetensors", state)
    restored = load_state(tmp_path / "state.safetensors")
    following = make_updates(members(9, 3, 2), 4)
    one, _ = chain.update(following, state)
    other, _ = chain.update(following, restored)
    assert np.array_equal(one.direction, other.direction)
    (tmp_path / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(ExchangeError, match="not a saved state"):
        load_state(tmp_path / "state.safetensors")


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_update_is_pure(seed):
    chain = build_chain(GUARDED_CHAIN)
    inputs = make_updates(members(seed, 3, 2), 1)
    copies = [m.vector.copy() for m in inputs.clients]
    state = chain.init()
    one, new = chain.update(inputs, state)
    two, _ = chain.update(inputs, state)
    assume(new != {})
    assert state == chain.init()
    assert np.array_equal(one.direction, two.direction)
    for member, copy in zip(inputs.clients, copies, strict=True):
        assert np.array_equal(member.vector, copy)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"transform": "equalise_norms"}], "must begin with `within_type_mean`"),
        ([{"transform": "within_type_mean"}], "must end with one of combine"),
        (
            [{"transform": "within_type_mean"}, {"transform": "deconflct"}],
            "did you mean 'deconflict'",
        ),
        ([{"transform": "within_type_mean", "decay": 1}], "no key 'decay'"),
        (["within_type_mean"], "write `transform: <name>`"),
        (
            [
                {"transform": "within_type_mean"},
                {"transform": "server_opt"},
                {"transform": "combine"},
            ],
            "put it last",
        ),
        ([{"transform": "within_type_mean"}, {"transform": "combine", "weights": "x"}], "choose"),
        ([], "must begin with"),
        *(
            ([{"transform": "within_type_mean"}, {"transform": name, option: value}], message)
            for name, option, value, message in (
                ("cagrad", "c", "much", "cagrad.c is 'much'; a number is needed"),
                ("cagrad", "c", float("nan"), "cagrad.c is nan; a finite number"),
                ("server_opt", "learning_rate", float("inf"), "learning_rate is inf; a finite"),
                ("equalise_norms", "decay", 5, "decay is 5.0, it must be in"),
            )
        ),
    ],
)
def test_wrong_chains_get_one_clear_line(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_chain(spec)


def test_malformed_updates_are_refused():
    with pytest.raises(FederationError, match="no update"):
        make_updates([])
    with pytest.raises(FederationError, match="differ in length"):
        make_updates([Member("a", "A", np.ones(2), 1.0), Member("b", "A", np.ones(3), 1.0)])
    with pytest.raises(FederationError, match="not above 0"):
        make_updates([Member("a", "A", np.ones(2), 0.0)])
