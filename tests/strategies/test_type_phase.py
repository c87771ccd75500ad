"""The type phase: first one bank for all types, then one per type, taught by what all of them predict."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import ToyFederation, lesson_of, toy_config
from toy_runs import events, start

from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.protocol.messages import Header, TrainRequest
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.strategies.build import check_strategy

SPEC = {
    "_component_": "heterotune_flwr.strategies.HeteroTune",
    "predictions": {"anchors": 12, "pool": 12, "batch": 8},
    "personalization_phase": 0.5,
}


def phased(tmp_path, clients=(2, 2, 1), rounds=4, **changes):
    tmp_path.mkdir(exist_ok=True)
    config = toy_config(tmp_path, clients, rounds=rounds)
    federation = ToyFederation(config)
    strategy, _ = start(config, federation, spec={**SPEC, **changes})
    return strategy, federation, config


def of_type(strategy, type_key):
    return strategy.roster.of_type(type_key)


def test_one_bank_for_all_then_one_per_type(tmp_path):
    strategy, federation, _ = phased(tmp_path)
    keys = strategy.roster.type_keys
    name = "slots.0.experts.global.0.up.weight"

    def sent(round):
        return {
            key: [federation.received[c, round].tensors[name] for c in of_type(strategy, key)]
            for key in keys
        }

    for round in (1, 2, 3):  # what round 3 begins with is the last shared bank
        values = [value for own in sent(round).values() for value in own]
        assert all(np.array_equal(values[0], value) for value in values), round
    last = sent(4)
    for own in last.values():
        assert all(np.array_equal(own[0], value) for value in own)
    assert not np.array_equal(last[keys[0]][0], last[keys[1]][0])
    assert set(strategy.state) >= {"global", *(f"type/{key}" for key in keys)}
    for key in keys:  # and the shared bank is kept beside them, as it was
        assert name in strategy.state[f"type/{key}"]
    kept = round_trip({name: strategy.state["global"][name]}, "bf16")[name]
    np.testing.assert_array_equal(kept, sent(3)[keys[0]][0])


def test_a_types_step_is_the_mean_of_its_clients_alone(tmp_path):
    strategy, federation, _ = phased(tmp_path)
    for key in strategy.roster.type_keys:
        clients = of_type(strategy, key)
        weights = [strategy.roster.clients[c].info.train_examples for c in clients]
        for name, value in strategy.state[f"type/{key}"].items():
            ends = [federation.answered[c, 4][name] for c in clients]
            expected = np.average(ends, axis=0, weights=weights)
            np.testing.assert_allclose(value, expected, atol=0.02 * np.abs(expected).max() + 1e-4)


def test_anchors_are_asked_about_from_the_last_shared_round_on(tmp_path):
    strategy, federation, config = phased(tmp_path)
    client = next(iter(strategy.roster.clients))
    lessons = [lesson_of(federation.received[client, round]) for round in (1, 2, 3, 4)]
    assert lessons[0] is None
    assert lessons[1].targets is None
    assert all(lesson.targets.shape == (12, 6) and lesson.batch == 8 for lesson in lessons[2:])
    logs = [event["channels"] for event in events(config, "round")]
    heard = [log.get("predictions", {}).get("clients") for log in logs]
    assert heard == [None, 5, 5, 5]
    assert [event["round"] for event in events(config, "personalization_phase")] == [3]


def test_types_that_share_nothing_go_through_the_phase_alone(tmp_path):
    """All are aligned too badly to share, or nothing is shared by design: there is no bank of all."""
    config = toy_config(tmp_path, (2, 2, 1), rounds=4)
    config.alignment.quality_threshold = 0.99
    strategy, _ = start(config, ToyFederation(config), spec=SPEC)
    assert strategy.personalized
    assert "global" not in strategy.state
    assert len(events(config, "round")) == 4


def test_without_a_teacher_the_bank_is_shared_to_the_end(tmp_path):
    strategy, _, config = phased(tmp_path, predictions=None)
    assert set(strategy.state) == {"global"}
    assert not events(config, "personalization_phase")


def test_without_a_phase_predictions_are_at_work_in_every_round(tmp_path):
    strategy, federation, _ = phased(tmp_path, personalization_phase=0)
    assert set(strategy.state) == {"global"}
    client = next(iter(strategy.roster.clients))
    assert all(lesson_of(federation.received[client, round]) for round in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("rounds", "share", "last"),
    [(10, 0.5, 5), (3, 0.5, 2), (1, 0.9, 1), (4, 0, 4), (4000, 0.9995, 2)],
)
def test_the_phase_is_whole_rounds_and_leaves_one_shared(tmp_path, rounds, share, last):
    strategy, _, _ = phased(tmp_path, (1, 1), rounds=1, personalization_phase=share)
    strategy.rounds = rounds
    assert strategy.shared_rounds == last


@pytest.mark.parametrize(
    ("option", "value"),
    [("personalization_phase", value) for value in (1, -0.1, 1.5, "half", True, float("nan"))],
)
def test_what_is_no_share_is_refused_before_anything_runs(option, value):
    config = compose("demo", "run.compare=[heterotune]")
    entry = {**config.strategies["heterotune"], option: value}
    with pytest.raises(ConfigError, match=f"{option} is"):
        check_strategy("heterotune", entry, config)


def test_the_first_round_with_anchors_is_not_hurried():
    """Each kind of work has deadlines of its own: reply times of rounds without anchors say nothing about it."""
    header = Header("run", 0, MethodConfig())
    efforts = {TrainRequest(header, {}, "", None, []).effort}
    for targets in (None, np.full((2, 2), 0.5, np.float32)):
        asked = DistillationRequest("d", 2, 2, 1.0, targets).to_payload()
        efforts.add(TrainRequest(header, {}, "", None, [], channels={"predictions": asked}).effort)
    assert len(efforts) == 3
