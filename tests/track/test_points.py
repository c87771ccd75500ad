"""What trackers are told of a run: numbers with rounds, each once, whatever was resumed."""

from __future__ import annotations

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import KINDS, Killed, killer, run_all

from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.track.points import PointsOf
from heterotune_flwr.track.settings import settings_of

START = {"event": "start", "strategy": "a", "seed": 0, "of": 3}


def of_round(number, loss, **fields):
    return {"event": "round", "strategy": "a", "seed": 0, "round": number, "loss": loss, **fields}


def points(events):
    sorted_in = PointsOf()
    for event in events:
        sorted_in.take(event)
    return sorted_in.settled(over=True)


def losses(events):
    (track,) = points(events).values()
    return [(p.step, p.values["train/loss"]) for p in track if "train/loss" in p.values]


def test_numbers_stand_under_names_that_say_what_they_are():
    event = of_round(
        2, 0.5, of=3, time=7.0, bytes_up=10, clients=4, types={"t@nf4": {"loss": 0.25}}, text="x",
        cmga={"slot": {"t@nf4": {"norms": [1.0], "agreement": 0.75}}}, channels={"predictions": {"entropy": 1.5}},
    )  # fmt: skip
    test = {
        "event": "evaluate",
        "strategy": "a",
        "seed": 0,
        "round": 2,
        "overall": {"global_accuracy_mean": 0.5},
    }
    ((key, found),) = points([START, event, test]).items()
    assert key == ("a", 0)
    assert found[0].time == 7.0
    assert found[0].values == {
        "train/loss": 0.5, "bytes/up": 10, "train/clients": 4, "train_by_type/loss/t@nf4": 0.25,
        "cmga/slot/t@nf4/agreement": 0.75, "channels/predictions/entropy": 1.5,
    }  # fmt: skip
    assert found[1].values == {"test/global_accuracy_mean": 0.5}


def test_faults_are_counted_by_round():
    failed = {"event": "client_failed", "strategy": "a", "seed": 0, "round": 1, "client_id": "c"}
    skipped = {"event": "skipped", "strategy": "a", "seed": 0, "round": 2}
    ((_, found),) = points([START, failed, failed, of_round(1, 1.0), skipped]).items()
    assert found[0].values["faults/failed"] == 2
    assert found[1].values == {"faults/skipped": 1}


def test_what_a_resumed_run_does_again_counts_once():
    first = [{"event": "journal"}, START, of_round(1, 1.0), of_round(2, 2.0), of_round(3, 3.0)]
    resumed = {"event": "resumed", "strategy": "a", "seed": 0, "round": 1, "evaluated": False}
    second = [{"event": "journal"}, START, resumed, of_round(2, 20.0), of_round(3, 30.0)]
    assert losses(first + second) == [(1, 1.0), (2, 20.0), (3, 30.0)]
    anew = [{"event": "journal"}, START, of_round(1, 10.0)]  # no checkpoint was left
    assert losses(first + anew) == [(1, 10.0)]
    done = [{"event": "journal"}, {"event": "already_finished", "strategy": "a", "seed": 0}]
    assert losses(first + done) == losses(first)


def test_nothing_of_an_earlier_start_is_given_before_this_one_has_come_to_it():
    sorted_in = PointsOf()
    for event in ({"event": "journal"}, START, of_round(1, 1.0), {"event": "journal"}):
        sorted_in.take(event)
    assert not sorted_in.settled()
    sorted_in.take(START)
    assert not sorted_in.settled()
    sorted_in.take({"event": "resumed", "strategy": "a", "seed": 0, "round": 1})
    assert [p.step for p in sorted_in.settled()["a", 0]] == [1]
    assert not sorted_in.settled()


def test_a_killed_and_resumed_run_has_the_curves_of_one_that_was_not(tmp_path):
    spec = {"local_only": KINDS["local_only"], "heterotune": KINDS["heterotune"]}
    config = toy_config(tmp_path, (1, 1, 1), spec, rounds=4, evaluate_every=2)
    run_all(config, ToyFederation(config), directory=tmp_path / "whole")
    federation, killed = ToyFederation(config), tmp_path / "killed"
    for at in (22, 14):
        with pytest.raises(Killed):
            run_all(config, federation, at != 22, killer(at), killed)
    run_all(config, federation, True, directory=killed)

    def curves(directory):
        told = ("train/loss", "train/accuracy", "test/global_accuracy_mean")
        return {
            track: [(p.step, {k: v for k, v in p.values.items() if k in told}) for p in found]
            for track, found in points(read_events(directory / "rounds.jsonl")).items()
        }

    assert curves(killed) == curves(tmp_path / "whole")
    assert set(curves(killed)) == {("local_only", 0), ("heterotune", 0)}


def test_settings_are_numbers_and_choices_and_no_text_of_anybodys_own(tmp_path):
    config = toy_config(
        tmp_path, (2, 1), {"mine": {"_component_": "a.B", "rate": 0.5, "api_key": "SECRET"}}
    )
    config.data.train, config.data.prompt = "/home/me/SECRET.csv", "SECRET {text}"
    told = settings_of(config)["mine"]
    assert told["train.learning_rate"] == config.train.learning_rate
    assert told["exchange.codec"] == "bf16"
    assert told["rate"] == 0.5
    assert "SECRET" not in str(told)
    assert str(tmp_path) not in str(told)
