"""Guests: clients without examples learn after the last round, from what the others predict; nobody from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_federation import ToyFederation, lesson_of, toy_config
from toy_runs import config_dir, events, start

from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.channels.statistics.record import Request
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.packing import round_trip
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.preflight import preflight
from heterotune_flwr.protocol.messages import TrainRequest
from heterotune_flwr.reporting.status import read_status
from heterotune_flwr.reporting.tables import final_table

COMPONENT = "heterotune_flwr.strategies"
SPEC = {
    "_component_": f"{COMPONENT}.HeteroTune",
    "predictions": {"anchors": 8, "pool": 10, "batch": 8, "guest_anchors": 12, "guest_steps": 40},
    "personalization_phase": 0.5,
}
LARGE = "large@fp32"
NAME = "slots.0.experts.global.0.up.weight"


def with_guest(tmp_path, clients=(2, 2, 2), rounds=4, spec=None, guest=True, **server):
    """A run in which the last type is a guest."""
    tmp_path.mkdir(exist_ok=True)
    config = toy_config(tmp_path, clients, rounds=rounds, **server)
    config.types[-1].guest = guest
    federation = ToyFederation(config)
    strategy, _ = start(config, federation, spec=spec or SPEC)
    return strategy, federation, config


def trained(federation):
    return {(client, round) for client, round in federation.received}


def test_guests_are_asked_once_after_the_last_round_about_all_anchors(tmp_path):
    strategy, federation, config = with_guest(tmp_path)
    guests = strategy.roster.of_type(LARGE)
    assert {(c, r) for c, r in trained(federation) if c in guests} == {(c, 4) for c in guests}
    request = federation.received[guests[0], 4]
    assert request.header.train.local_steps == 40
    lesson = lesson_of(request)
    assert lesson.targets.shape == (12, 6)
    assert (lesson.wanted, lesson.batch) == (0, 8)
    learner = strategy.roster.learners[0]
    wanted = [lesson_of(federation.received[learner, round]).wanted for round in (2, 3, 4)]
    assert wanted == [8, 8, 12]  # in the last round on all, for the guests
    (event,) = events(config, "guests")
    assert (event["round"], event["types"], event["clients"]) == (4, [LARGE], 2)


def test_a_guest_learns_with_the_classifiers_share(tmp_path):
    """The others' predictions hold it, and the tests add it: without it a guest would learn it once more."""
    strategy, federation, _ = with_guest(tmp_path, spec={**SPEC, "statistics": {"weight": 0.5}})
    (guest, *_) = strategy.roster.of_type(LARGE)
    taught = federation.received[guest, 4]
    assert lesson_of(taught).wanted == 0
    asked = Request.from_payload(taught.channels["statistics"])
    statistics = next(channel for channel in strategy.channels if channel.name == "statistics")
    np.testing.assert_array_equal(asked.classifier.weight, statistics.classifier(LARGE).weight)
    assert asked.min_count == 0


def test_status_counts_no_examples_of_a_guest(tmp_path):
    strategy, _, config = with_guest(tmp_path)
    clients = read_status(Path(config.run.dir)).clients
    examples = {client_id: client.examples for client_id, client in clients.items()}
    assert all(examples[client_id] == 0 for client_id in strategy.roster.of_type(LARGE))
    assert all(examples[client_id] > 0 for client_id in strategy.roster.learners)


def test_without_guests_the_last_round_is_like_the_others(tmp_path):
    strategy, federation, config = with_guest(tmp_path, guest=False)
    lessons = [lesson_of(federation.received[c, 4]) for c in strategy.roster.clients]
    assert {lesson.wanted for lesson in lessons} == {8}
    assert not events(config, "guests")


def test_a_guest_starts_from_the_mean_of_the_types_banks(tmp_path):
    strategy, federation, _ = with_guest(tmp_path)
    (first, *_), keys = strategy.roster.of_type(LARGE), ("small@fp32", "middle@fp32")
    sent = federation.received[first, 4].tensors[NAME]
    mean = np.mean([strategy.state[f"type/{key}"][NAME] for key in keys], axis=0)
    np.testing.assert_array_equal(sent, round_trip({NAME: mean}, "bf16")[NAME])
    ends = [federation.answered[c, 4][NAME] for c in strategy.roster.of_type(LARGE)]
    got = strategy.state[f"type/{LARGE}"][NAME]
    np.testing.assert_allclose(got, np.mean(ends, axis=0), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("phase", [0.0, 0.5])
def test_nothing_a_guest_computes_reaches_the_others(tmp_path, phase):
    spec = {**SPEC, "personalization_phase": phase}
    calm, _, _ = with_guest(tmp_path / "calm", spec=spec)
    wild_config = toy_config((tmp_path / "calm"), (2, 2, 2), rounds=4)
    wild_config.types[-1].guest = True
    wild_config.run.dir = str(tmp_path / "wild")
    federation = ToyFederation(wild_config)
    federation.nan = {(c, 4) for c in calm.roster.of_type(LARGE)}
    wild, _ = start(wild_config, federation, spec=spec)
    for group, tensors in calm.state.items():
        if group == f"type/{LARGE}":
            continue
        for name, value in tensors.items():
            np.testing.assert_array_equal(value, wild.state[group][name])
    refused = events(wild_config, "refused")
    assert {event["client_id"] for event in refused} == set(calm.roster.of_type(LARGE))


def guest_accuracy(rows):
    return next(row.global_accuracy for row in rows if row.type_key == LARGE)


def taught(tmp_path, **spec):
    """Before and after, of a guest that 64 anchors teach."""
    config = toy_config(tmp_path, (4, 4, 1), rounds=6)
    Path(config.alignment.anchors).write_text("\n".join(f"public text {i}" for i in range(64)))
    config.types[-1].guest = True
    predictions = {"anchors": 64, "pool": 64, "guest_steps": 20}
    strategy, _ = start(config, ToyFederation(config), spec={**spec, "predictions": predictions})
    return guest_accuracy(strategy.outcome.before), guest_accuracy(strategy.outcome.rows)


def test_a_guest_learns_what_the_others_know(tmp_path):
    bare, reached = taught(tmp_path, **SPEC)
    assert reached > bare + 0.3


def test_predictions_alone_teach_a_guest_too(tmp_path):
    lora = {"kind": "lora", "lora_rank": 4}
    bare, reached = taught(tmp_path, _component_=f"{COMPONENT}.FedMKT", method=lora)
    assert reached > bare + 0.2


def test_where_nobody_teaches_a_guest_takes_the_bank_and_is_asked_nothing(tmp_path):
    strategy, federation, config = with_guest(tmp_path, spec={**SPEC, "predictions": None})
    assert not [c for c, _ in trained(federation) if c in strategy.roster.of_type(LARGE)]
    state = strategy.state
    np.testing.assert_array_equal(state[f"type/{LARGE}"][NAME], state["global"][NAME])
    (event,) = events(config, "guests")
    assert event["clients"] == 0


def test_what_is_kept_at_home_is_learnt_there(tmp_path):
    spec = {
        "_component_": f"{COMPONENT}.FedMKT",
        "method": {"kind": "lora", "lora_rank": 4},
        "predictions": {"anchors": 12, "pool": 12, "guest_steps": 60},
    }
    strategy, federation, _ = with_guest(tmp_path, rounds=3, spec=spec)
    row = next(row for row in strategy.outcome.rows if row.type_key == LARGE)
    before = next(row for row in strategy.outcome.before if row.type_key == LARGE)
    assert row.global_loss != before.global_loss  # its own file was read after the lesson
    (client, *_), kept = strategy.roster.of_type(LARGE), federation.states
    assert [list(rounds) for (_, owner), rounds in kept.items() if owner == client] == [[3]]


def test_a_guest_whose_type_trains_takes_what_the_type_has_learnt(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    config = toy_config(tmp_path, (2, 2, 2), rounds=3)
    federation = ToyFederation(config)
    federation.examples_of = lambda partition: 0 if partition == 5 else 48
    strategy, _ = start(config, federation, spec=SPEC)
    assert strategy.roster.guest_types == []
    assert ("client-0005", 3) not in federation.received
    rows = {row.client_id: row for row in strategy.outcome.rows}
    assert rows["client-0005"].global_accuracy == rows["client-0002"].global_accuracy


def test_a_run_that_goes_on_teaches_its_guests_again(tmp_path):
    config = toy_config(tmp_path, (2, 1, 1), {"heterotune": SPEC}, rounds=3)
    config.types[-1].guest = True
    config.run.compare = ["heterotune"]
    federation = ToyFederation(config)
    journal = Journal(config_dir(config))
    run_strategies(federation.grid(), config, journal, "toy-0")
    config.server.rounds = 5
    journal = Journal(config_dir(config))
    results = run_strategies(federation.grid(), config, journal, "toy-0", True)
    guest = "client-0002"
    assert {round for client, round in trained(federation) if client == guest} == {3, 5}
    lessons = [lesson_of(federation.received["client-0000", round]) for round in (4, 5)]
    assert [lesson.targets.shape for lesson in lessons] == [(8, 6), (8, 6)]
    first = lesson_of(federation.received[guest, 3]).targets
    chosen = round_anchors(10, 8, 0, 4)  # the round's own, out of all that was predicted for guests
    np.testing.assert_array_equal(lessons[0].targets, first[chosen])
    assert "large@fp32 (guest)" in final_table(results, tmp_path)


def test_a_crash_before_the_last_test_changes_nothing(tmp_path):
    whole, _, _ = with_guest(tmp_path / "whole")
    config = toy_config(tmp_path / "whole", (2, 2, 2), {"heterotune": SPEC}, rounds=4)
    config.types[-1].guest = True
    config.run.compare, config.run.dir = ["heterotune"], str(tmp_path / "cut")
    federation = ToyFederation(config)
    evaluate = federation.evaluate

    def dies(message, context):
        if message.metadata.group_id == "4":
            raise KeyboardInterrupt
        return evaluate(message, context)

    federation.evaluate = dies
    with pytest.raises(KeyboardInterrupt):
        run_strategies(federation.grid(), config, Journal(config_dir(config)), "toy-0")
    federation.evaluate = evaluate
    results = run_strategies(federation.grid(), config, Journal(config_dir(config)), "toy-0", True)
    (run,) = results["runs"]
    assert [c["global_loss"] for c in run["clients"]] == [r.global_loss for r in whole.outcome.rows]


def test_a_lesson_is_no_round(tmp_path):
    """No quorum closes it, dead guests do not end the run, and its time is measured apart."""
    config = toy_config(tmp_path, (2, 1, 3), rounds=2, quorum=0.5, grace_seconds=0.0)
    config.types[-1].guest = True
    federation = ToyFederation(config)
    died = []

    def train(message, context):
        asked = lesson_of(TrainRequest.from_content(message.content))
        if message.metadata.dst_node_id in guests and asked.targets is not None:
            died.append(message.metadata.dst_node_id)
            raise MemoryError
        return original(message, context)

    original, federation.train = federation.train, train
    guests = {1000 + index * 7919 for index in (2, 4, 5)}
    strategy, _ = start(config, federation, spec={**SPEC, "personalization_phase": 0.0})
    assert set(died) == guests
    failed = {e["client_id"] for e in events(config, "client_failed")}
    assert failed == set(strategy.roster.of_type(LARGE))
    assert strategy.outcome.rows
    assert not events(config, "round_closed")
    times = strategy.transport.safety.times.state_dict()["own"]
    assert set(times["train+predictions fit 12 of 8"]) == set(strategy.roster.learners)
    assert "train+predictions 8 of 8" in times


def test_a_run_that_is_ended_early_gives_its_guests_the_bank(tmp_path):
    config = toy_config(tmp_path, (2, 1, 1), {"heterotune": SPEC}, rounds=6)
    config.types[-1].guest = True
    config.run.compare = ["heterotune"]
    federation = ToyFederation(config)
    federation.fail = {(f"client-000{c}", 5) for c in range(4)}
    config.server.give_up_after = 1
    with pytest.raises(FederationError):
        run_strategies(federation.grid(), config, Journal(config_dir(config)), "toy-0")
    config.server.rounds = 4
    (run,) = run_strategies(federation.grid(), config, Journal(config_dir(config)), "toy-0", True)[
        "runs"
    ]
    (event,) = events(config, "guests")
    assert (event["round"], event["clients"]) == (4, 0)
    assert not [c for c, _ in trained(federation) if c == "client-0002"]
    before = run["before"]["types"][LARGE]["global_accuracy_mean"]
    assert run["types"][LARGE]["global_accuracy_mean"] > before


def test_a_federation_of_guests_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"every type is a guest.*types\.\*\.guest=false"):
        preflight(compose("demo", [f"types.{i}.guest=true" for i in range(3)]))
    config = toy_config(tmp_path, (1, 1))
    federation = ToyFederation(config)
    federation.examples_of = lambda partition: 0
    with pytest.raises(FederationError, match="every client is a guest"):
        start(config, federation)
    with pytest.raises(ConfigError, match="a round asks 8 of the 8 clients that train"):
        preflight(compose("demo", ["types.2.guest=true", "server.min_results=9"]))


def test_a_simulated_guest_leaves_the_others_data_alone(tmp_path):
    plain = compose("demo")
    guest = compose("demo", ["types.2.guest=true"])
    for partition in range(4):
        node = {"partition-id": partition, "num-partitions": 12}
        own, other = (identify(c, node).examples(7) for c in (plain, guest))
        assert own.personal_test == other.personal_test
        assert other.train == ([] if partition % 3 == 2 else own.train)
