"""CMGA's chain against closed forms and properties: what it claims, it keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterotune_flwr.cmga import DEFAULT_CHAIN, MEAN_CHAIN, Member, build_chain, make_updates
from heterotune_flwr.cmga.base import LazyMember
from heterotune_flwr.cmga.server_optimizers import KINDS
from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.exchange.trees import load_state, save_state

DIMENSION = 12
CLIP = {"transform": "clip_to_median"}
MEAN = {"transform": "within_type_mean"}
EXAMPLES = {"transform": "combine", "weights": "examples"}
#: Every chain that a test below does not name itself.
CHAINS = {
    "default": DEFAULT_CHAIN,
    "mean": MEAN_CHAIN,
    "pcgrad": [CLIP, {"transform": "pcgrad"}, MEAN, {"transform": "combine"}],
    "cagrad": [CLIP, {"transform": "cagrad"}],
    "types": [CLIP, MEAN, {"transform": "pcgrad"}, {"transform": "cagrad"}],
}


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


def direction(chain_spec, clients):
    return run(chain_spec, [clients])[1].direction


def median_length(clients):
    """Lower median of the lengths of those that move."""
    lengths = sorted(length for m in clients if (length := np.linalg.norm(m.vector)) > 0)
    return lengths[(len(lengths) - 1) // 2]


seeds = st.integers(0, 2**32 - 1)
shapes = {"seed": seeds, "types": st.integers(1, 5), "per_type": st.integers(1, 4)}
every_chain = pytest.mark.parametrize("spec", CHAINS.values(), ids=CHAINS)


@every_chain
@given(**shapes)
@settings(max_examples=8, deadline=None)
def test_order_of_clients_does_not_matter_to_the_last_bit(spec, seed, types, per_type):
    clients = members(seed, types, per_type)
    shuffled = [clients[i] for i in np.random.default_rng(seed).permutation(len(clients))]
    _, one = run(spec, [clients, clients])
    _, other = run(spec, [shuffled, clients])
    assert np.array_equal(one.direction, other.direction)


@given(factor=st.sampled_from([1.5, 10.0, 1e5]), **shapes)
@settings(max_examples=30, deadline=None)
def test_how_much_longer_than_the_median_a_client_is_does_not_matter(factor, seed, types, per_type):
    clients = members(seed, types, per_type)
    bound = median_length(clients)
    long = [m for m in clients if np.linalg.norm(m.vector) > bound * (1 + 1e-9)]
    louder = [m.scaled(factor) if m in long[:1] else m for m in clients]
    np.testing.assert_allclose(
        direction(DEFAULT_CHAIN, louder), direction(DEFAULT_CHAIN, clients), rtol=1e-9
    )


@pytest.mark.parametrize("spec", [CHAINS["default"], CHAINS["pcgrad"], [CLIP, MEAN, EXAMPLES]])
@given(**shapes)
@settings(max_examples=30, deadline=None)
def test_no_step_is_longer_than_the_median_update(spec, seed, types, per_type):
    clients = members(seed, types, per_type)
    assert np.linalg.norm(direction(spec, clients)) <= median_length(clients) * (1 + 1e-9)


@given(factor=st.sampled_from([-1e6, -1.0, 0.0, 1e6]), **shapes)
@settings(max_examples=30, deadline=None)
def test_whatever_one_client_sends_it_pulls_as_a_usual_one_does(factor, seed, types, per_type):
    liar, *others = members(seed, types, per_type + 1, 0.3)
    lie = factor * np.random.default_rng(seed).normal(size=DIMENSION)
    clients = [Member(liar.key, liar.type_key, lie, liar.examples), *others]
    _, result = run([CLIP, MEAN, EXAMPLES], [clients])
    bound = result.log["clip_length"]
    lengths = sorted(np.linalg.norm(m.vector) for m in others)
    assert bound <= lengths[len(others) // 2] * (1 + 1e-9)  # which no liar can raise
    total = sum(m.examples for m in clients)
    without = sum(
        m.examples / total * m.vector * min(1, bound / np.linalg.norm(m.vector)) for m in others
    )
    pull = np.linalg.norm(result.direction - without)
    assert pull <= liar.examples / total * bound * (1 + 1e-6)


@given(**shapes)
@settings(max_examples=30, deadline=None)
def test_equally_long_updates_are_left_as_they_are(seed, types, per_type):
    alike = [
        Member(m.key, m.type_key, np.sign(m.vector), m.examples)
        for m in members(seed, types, per_type)
    ]
    _, clipped = run([CLIP, MEAN, EXAMPLES], [alike])
    assert np.array_equal(clipped.direction, direction(MEAN_CHAIN, alike))
    assert clipped.log["clipped"] == 0


def test_a_type_too_loud_is_shortened_to_the_others_even_where_it_is_half_of_all():
    quiet = [Member(f"a{i}", "A", np.eye(4)[i], 1.0) for i in range(2)]
    loud = [Member(f"b{i}", "B", 10 * np.eye(4)[2 + i], 1.0) for i in range(2)]
    _, result = run(DEFAULT_CHAIN, [[*quiet, *loud]])
    np.testing.assert_allclose(result.direction, np.full(4, 0.25))
    assert result.log["clipped"] == 2
    assert result.log["clip_length"] == pytest.approx(1.0)
    lone = [Member("a", "A", np.eye(2)[0], 1.0), Member("b", "B", 10 * np.eye(2)[1], 1.0)]
    np.testing.assert_allclose(direction(DEFAULT_CHAIN, lone), [0.5, 0.5])


def test_who_sends_nothing_does_not_silence_the_others():
    silent = [Member(f"s{i}", "S", np.zeros(2), 1.0) for i in range(5)]
    moving = Member("m", "M", np.array([0.0, 2.0]), 1.0)
    np.testing.assert_allclose(direction(DEFAULT_CHAIN, [*silent, moving]), [0.0, 1.0])


@every_chain
@given(seed=seeds, types=st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_zero_updates_make_no_nan_and_no_step(spec, seed, types):
    zeros = [
        Member(m.key, m.type_key, np.zeros(DIMENSION), m.examples) for m in members(seed, types, 2)
    ]
    _, result = run(spec, [zeros, zeros])
    assert np.array_equal(result.direction, np.zeros(DIMENSION))
    # One silent type among working ones, before and after it worked.
    working = members(seed, types + 1, 2)
    some = [z if z.type_key == "type-0" else w for z, w in zip(zeros[:2], working[:2], strict=True)]
    _, result = run(spec, [working, some + working[2:], working])
    assert np.isfinite(result.direction).all()
    assert np.linalg.norm(result.direction) > 0


@given(**shapes)
@settings(max_examples=30, deadline=None)
def test_mean_chain_is_the_weighted_mean(seed, types, per_type):
    clients = members(seed, types, per_type)
    total = sum(m.examples for m in clients)
    oracle = sum(m.vector * m.examples for m in clients) / total
    np.testing.assert_allclose(direction(MEAN_CHAIN, clients), oracle, rtol=1e-9, atol=1e-9)


@given(**shapes)
@settings(max_examples=30, deadline=None)
def test_the_default_is_the_mean_over_types_of_their_clipped_means(seed, types, per_type):
    clients = members(seed, types, per_type)
    bound = median_length(clients)
    means = []
    for key in {m.type_key for m in clients}:
        own = [m for m in clients if m.type_key == key]
        short = [m.vector * min(1, bound / np.linalg.norm(m.vector)) for m in own]
        means.append(np.average(short, axis=0, weights=[m.examples for m in own]))
    _, result = run(DEFAULT_CHAIN, [clients])
    np.testing.assert_allclose(result.direction, np.mean(means, axis=0), rtol=1e-9, atol=1e-12)
    assert set(result.log["weights"].values()) == {1 / types}


def test_updates_that_are_read_when_needed_give_the_same_bits():
    clients = members(0, 3, 3)
    lazy = [
        LazyMember(m.key, m.type_key, m.examples, m.size, lambda m=m: m.vector.copy())
        for m in clients
    ]
    for spec in CHAINS.values():
        assert np.array_equal(direction(spec, clients), direction(spec, lazy))


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
    spec = [*DEFAULT_CHAIN[:-1], {"transform": "server_opt", "kind": "adam"}]
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


@every_chain
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_update_is_pure(spec, seed):
    optimizer = {"transform": "server_opt", "kind": "momentum"}
    chain = build_chain([*(e for e in spec if e["transform"] != "server_opt"), optimizer])
    inputs = make_updates(members(seed, 3, 2), 1)
    copies = [m.vector.copy() for m in inputs.members]
    state = chain.init()
    one, _ = chain.update(inputs, state)
    two, _ = chain.update(inputs, state)
    assert state == chain.init()
    assert np.array_equal(one.direction, two.direction)
    for member, copy in zip(inputs.members, copies, strict=True):
        assert np.array_equal(member.vector, copy)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "is empty; null is the default chain"),
        ([MEAN], "must end with one of combine"),
        ([MEAN, CLIP, EXAMPLES], "put it before `within_type_mean`"),
        ([MEAN, MEAN, EXAMPLES], "names `within_type_mean` twice"),
        ([MEAN, {"transform": "cagrad"}, EXAMPLES], "must end with one of combine"),
        ([MEAN, {"transform": "cagard"}], "did you mean 'cagrad'"),
        ([{**MEAN, "decay": 1}], "no key 'decay'"),
        (["within_type_mean"], "write `transform: <name>`"),
        ([MEAN, {"transform": "server_opt"}, EXAMPLES], "put it last"),
        ([MEAN, {"transform": "combine", "weights": "x"}], "choose equal or examples"),
        ([{"transform": "equalise_norms"}, EXAMPLES], "clip_to_median makes no type pull harder"),
        ([MEAN, {"transform": "deconflict"}, EXAMPLES], "it is called pcgrad now"),
        ([MEAN, {**EXAMPLES, "guard": False}], "no type's own update is guarded any more"),
        ([MEAN, {**EXAMPLES, "rescale": True}], "a step is as long as it comes out"),
        *(
            ([MEAN, {"transform": name, option: value}], message)
            for name, option, value, message in (
                ("cagrad", "c", 1.5, "cagrad.c is 1.5, it must be in"),
                ("cagrad", "c", "much", "cagrad.c is 'much'; a number is needed"),
                ("cagrad", "c", float("nan"), "cagrad.c is nan; a finite number"),
                ("server_opt", "learning_rate", float("inf"), "learning_rate is inf; a finite"),
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
