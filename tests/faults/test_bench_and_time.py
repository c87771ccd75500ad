"""Who is benched, what a skipped round leaves, how long a dead node is waited for, what survives a restart."""

from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest
from fault_federation import run, toy_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_faults import FAULTS, Hostile

from heterotune_flwr.errors import FederationError
from heterotune_flwr.federation.cooldown import Cooldowns
from heterotune_flwr.federation.deadlines import ReplyTimes
from heterotune_flwr.federation.safety import Safety
from heterotune_flwr.federation.sampling import sample_clients
from heterotune_flwr.strategies.strategy import HeteroStrategy

IDS = [f"client-{i:04d}" for i in range(10)]


# ---------------------------------------------------------------------------------------- the cooldown


def test_the_bench_backs_off_and_forgives():
    cooldown = Cooldowns(after=3, longest=8)
    sat, round = [], 0
    while round < 60:
        round += 1
        if "a" in cooldown.cooling(round):
            continue
        until = cooldown.record(round, ["b", "c"], ["a"], "abc").get("a")
        if until:
            sat.append(until - round)
    assert sat[:5] == [2, 4, 8, 8, 8]
    cooldown = Cooldowns(after=2)
    for round in (1, 2):
        cooldown.record(round, "b", "a", "ab")
    assert cooldown.cooling(3) == cooldown.cooling(4) == ["a"]
    assert cooldown.cooling(5) == []
    assert cooldown.returned(5) == ["a"]
    assert cooldown.returned(6) == []
    cooldown.record(5, "ab", "", "ab")
    cooldown.record(6, "b", "a", "ab")
    assert not cooldown.cooling(7)  # one failure after a success is one strike


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_never_everybody_and_the_saved_bench_goes_on_alike(seed, after, keep, clients):
    rng = np.random.default_rng(seed)
    ids = IDS[:clients]
    cooldown, other = Cooldowns(after, 16, keep), Cooldowns(after, 16, keep)
    for round in range(1, 25):
        asked = [cid for cid in ids if cid not in cooldown.cooling(round)]
        assert len(asked) >= min(keep, clients)
        failed = [cid for cid in asked if rng.random() < 0.8]
        other.load_state_dict(json.loads(json.dumps(cooldown.state_dict())))
        fine = set(asked) - set(failed)
        assert cooldown.record(round, fine, failed, ids) == other.record(round, fine, failed, ids)
        assert cooldown.state_dict() == other.state_dict()


def test_sampling_is_a_function_of_ids_seed_round_and_the_bench():
    assert sample_clients(IDS, 0.5, 1, 4, ["client-0003"]) == sample_clients(
        IDS[::-1], 0.5, 1, 4, {"client-0003"}
    )
    for round in range(30):
        chosen = sample_clients(IDS, 0.5, 0, round, IDS[:3])
        assert len(chosen) == 5
        assert not set(chosen) & set(IDS[:3])
    assert sample_clients(IDS, 0.5, 0, 1, IDS[:8]) == IDS[8:]
    assert len(sample_clients(IDS, 0.5, 0, 1, oversample=0.4)) == 7


@pytest.mark.parametrize("fault", ["nan", None])
def test_a_client_that_fails_again_and_again_is_not_asked_and_comes_back(fault):
    hostile = Hostile(("client-0001",), FAULTS[fault] if fault else None)
    ended = run(toy_spec("heterotune"), prepare=hostile, rounds=9)
    (first, second) = [(e["round"], e["until"]) for e in ended.of("cooldown")]
    assert (first, second) == ((3, 5), (6, 10))
    assert [e["round"] for e in ended.of("returned")] == [6]
    failures = ended.of("refused" if fault else "client_failed")
    assert [e["round"] for e in failures] == [1, 2, 3, 6]
    assert [e["clients"] for e in ended.of("round")] == [9] * 9


# ------------------------------------------------------------------------------------ skipped rounds


def frozen(strategy):
    """A copy of all that a skipped round must not touch."""
    gate = strategy.transport.safety.gate.state_dict()
    parts = [strategy.state, strategy.state_dict(), gate["levels"], gate["last"]]
    return copy.deepcopy([*parts, *(channel.state_dict() for channel in strategy.channels)])


@pytest.mark.parametrize("name", ["heterotune_lora", "fedadam", "scaffold"])
def test_a_round_with_too_few_updates_changes_nothing(name, monkeypatch):
    seen = []
    aggregate = HeteroStrategy.aggregate_train

    def spied(self, server_round, replies):
        before = frozen(self)
        answer = aggregate(self, server_round, replies)
        seen.append((answer[1] is None, before, frozen(self)))
        return answer

    monkeypatch.setattr(HeteroStrategy, "aggregate_train", spied)
    lost = Hostile(tuple(IDS[:6]), FAULTS["inf"])

    def from_round_three(federation, grid):
        honest = federation.train
        lost(federation, grid)
        hostile = federation.train
        federation.train = lambda message, context: (
            hostile if message.content["config"]["round"] in (3, 4) else honest
        )(message, context)

    ended = run(toy_spec(name), prepare=from_round_three, rounds=5, min_results=5)
    assert [skipped for skipped, _, _ in seen] == [False, False, True, True, False]
    for skipped, before, after in seen:
        same = str_of(before) == str_of(after)
        assert same == skipped
    assert ended.strategy.outcome.skipped == [3, 4]
    assert [(e["usable"], e["needed"]) for e in ended.of("skipped")] == [(4, 5)] * 2


def str_of(value):
    """Every bit of nested dictionaries and arrays, as text."""
    if isinstance(value, np.ndarray):
        return value.tobytes().hex()
    if isinstance(value, dict):
        return {key: str_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [str_of(item) for item in value]
    return value


def test_a_run_that_never_gets_enough_ends_with_a_clear_reason():
    with pytest.raises(FederationError, match=r"fewer than 5 .*client-0000"):
        run(toy_spec("heterotune"), prepare=Hostile(tuple(IDS[:6]), None), rounds=6, min_results=5)


# -------------------------------------------------------------------------------------------- time


def test_deadlines_follow_the_type_once_a_client_has_answered():
    times = ReplyTimes(timeout=3600, floor=60, factor=3)
    assert times.deadline("train", "a", "x") == 3600
    for client_id, seconds in (("x", 100.0), ("y", 120.0), ("z", 140.0)):
        times.measured("train", "a", client_id, seconds)
    assert times.deadline("train", "a", "x") == 360
    assert (
        times.deadline("train", "a", "z") == 420
    )  # slower than its type, and given its own measure
    assert times.deadline("train", "a", "new") == 3600
    assert times.deadline("evaluate", "a", "x") == 3600
    times.measured("train", "b", "w", 0.1)
    assert times.deadline("train", "b", "w") == 60
    times.measured("train", "c", "v", 5000.0)
    assert times.deadline("train", "c", "v") == 3600
    assert ReplyTimes(3600, 60, None).deadline("train", "a", "x") == 3600
    assert times.deadline("train+anchors", "a", "x") == 3600
    times.missed("x")  # a node that may be dead holds nobody up for an hour again
    assert times.deadline("train+anchors", "a", "x") == 360
    times.measured("evaluate", "a", "x", 100.0)
    assert times.deadline("train+anchors", "a", "x") == 3600
    warm, cold = ReplyTimes(3600), ReplyTimes(3600)
    state = json.loads(json.dumps(times.state_dict()))
    warm.load_state_dict(state, warm=True)
    cold.load_state_dict(state)
    assert warm.state_dict() == times.state_dict()
    assert warm.deadline("train", "a", "x") == 360
    assert (
        cold.deadline("train", "a", "x") == 3600
    )  # its process is new and loads its backbone again


def dead(federation_node):
    return lambda node, kind, round: node == federation_node and round >= 2


def first_node():
    found = []
    run(toy_spec("local_only"), rounds=1, prepare=lambda _, grid: found.extend(grid.get_node_ids()))
    return found[0]


def test_a_node_that_died_costs_no_more_than_its_deadline():
    started = time.monotonic()
    ended = run(
        toy_spec("bank"), drop=dead(first_node()), rounds=4, timeout_seconds=30.0,
        deadline_floor_seconds=0.3, cooldown_after=0,
    )  # fmt: skip
    assert time.monotonic() - started < 15
    late = [event for event in ended.of("client_failed") if event.get("straggler")]
    trained = [event for event in late if event["message_type"] == "train"]
    assert [event["round"] for event in trained] == [2, 3, 4]
    for event in trained:
        assert "no reply within" in event["reason"]
        assert 0.25 < event["waited_seconds"] < 5


def test_a_quorum_closes_the_round_after_its_grace():
    started = time.monotonic()
    ended = run(
        toy_spec("heterotune"), drop=dead(first_node()), rounds=3, timeout_seconds=30.0,
        deadline_factor=None, quorum=0.8, grace_seconds=0.2, evaluate_every=0,
        prepare=_answers_evaluation,
    )  # fmt: skip
    assert time.monotonic() - started < 20
    closed = ended.of("round_closed")
    assert [event["round"] for event in closed] == [2, 3]
    assert all(event["unawaited"] == ["client-0000"] for event in closed)
    assert not ended.of("client_failed")
    assert not ended.of("cooldown")  # not waiting for a client is not its failure
    assert [event["clients"] for event in ended.of("round")] == [10, 9, 9]


def _answers_evaluation(federation, grid):
    """The node is only silent when it is to train."""
    drop = grid.drop
    grid.drop = lambda node, kind, round: kind == "train" and drop(node, kind, round)


def test_more_are_asked_than_needed_and_the_first_taken():
    ended = run(toy_spec("heterotune"), participation=0.5, oversample=0.6, rounds=3)
    assert [event["clients"] for event in ended.of("round")] == [5, 5, 5]
    assert [len(event["unawaited"]) for event in ended.of("round_closed")] == [3, 3, 3]


# --------------------------------------------------------------------------------- save and restore


def test_a_restored_gate_and_bench_go_on_bit_for_bit(monkeypatch):
    """Every round the safety state goes through JSON into new objects: nothing may be different at the end."""
    flip = Hostile(("client-0001", "client-0005"), FAULTS["flip_x10"])
    whole = run(toy_spec("heterotune"), prepare=flip, rounds=8, participation=0.7)
    configure = HeteroStrategy.configure_train
    states = []

    def reborn(self, server_round, arrays, config, grid):
        text = json.dumps(self.transport.safety.state_dict())
        states.append(text)
        self.transport.safety = Safety.of(self.config.server, self.config.exchange)
        self.transport.safety.load_state_dict(json.loads(text))
        return configure(self, server_round, arrays, config, grid)

    monkeypatch.setattr(HeteroStrategy, "configure_train", reborn)
    parts = run(toy_spec("heterotune"), prepare=flip, rounds=8, participation=0.7)
    assert len(states) == 8
    assert whole.of("cooldown")
    assert whole.of("cooldown") == parts.of("cooldown")
    assert [e["client_id"] for e in whole.of("refused")] == [
        e["client_id"] for e in parts.of("refused")
    ]
    for name, value in whole.strategy.shared_tensors().items():
        np.testing.assert_array_equal(value, parts.strategy.shared_tensors()[name])
    one, other = (e.strategy.transport.safety for e in (whole, parts))
    assert one.gate.state_dict() == other.gate.state_dict()
    assert one.cooldown.state_dict() == other.cooldown.state_dict()
