"""Two hostile clients of ten: the run ends well, and as it would have without them.

A representative part of ``python -m benchmarks.reliability.faults``: every fault on HeteroTune, one on every strategy.
"""

from __future__ import annotations

import numpy as np
import pytest
from fault_cases import PLACES, applies, play
from fault_federation import SHIPPED, answering, run, toy_spec
from wire_faults import FAULTS, Hostile

from heterotune_flwr.protocol.payloads import Payload, add_payloads
from heterotune_flwr.protocol.wire import error_content

NAMES = list(FAULTS)


def check(strategy, fault, place):
    case = play(strategy, fault, place)
    assert case.survived, case
    assert case.detected == FAULTS[fault].seen, case
    if case.detected:
        assert case.gap_percent < 2.0, case


@pytest.mark.parametrize("fault", NAMES)
def test_every_fault_on_heterotune(fault):
    check("heterotune", fault, "one type")


@pytest.mark.parametrize(("index", "strategy"), list(enumerate(SHIPPED)))
def test_a_fault_on_every_strategy(index, strategy):
    """A turned-round update where tensors travel, and one other fault, a different one for each strategy."""
    others = [name for name in NAMES if applies(strategy, name) and FAULTS[name].seen]
    check(strategy, others[index % len(others)], "two types")
    if applies(strategy, "flip_x10"):
        check(strategy, "flip_x10", "one type")


@pytest.mark.parametrize("hostile", [*PLACES.values(), ("client-0000", "client-0003")])
@pytest.mark.parametrize("name", ["heterotune", "within_type", "fedit", "rolora", "fed_sb"])
def test_a_flip_is_seen_in_the_first_round_wherever_the_two_are(name, hostile):
    flip = Hostile(hostile, FAULTS["flip_x10"])
    ended = run(toy_spec(name), prepare=flip, rounds=2, norm_ceiling=None)
    first = {event["client_id"] for event in ended.of("refused") if event["round"] == 1}
    assert first == set(hostile)
    assert {event["check"] for event in ended.of("refused")} == {"size"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("clients", "participation"), [((4, 3, 3), 1.0), ((7, 2, 1), 0.4), ((2, 1, 0), 1.0)]
)
def test_honest_clients_are_never_refused(clients, participation, optimizer):
    """Strong skew, types of very different size, few of the clients in a round."""
    for name in ("heterotune", "fedit", "rolora"):
        spec = toy_spec(name)
        if optimizer == "sgd":
            spec["train"] = {"optimizer": "sgd", "learning_rate": 0.5}
        ended = run(spec, clients, skew=0.05, participation=participation, rounds=8)
        assert not ended.of("refused")


def test_refusals_are_in_the_journal_the_results_and_the_final_table(tmp_path):
    from heterotune_flwr.reporting.tables import faults

    ended = run(toy_spec("heterotune"), prepare=Hostile(("client-0002",), FAULTS["nan"]), rounds=3)
    outcome = ended.strategy.outcome.to_json()
    assert outcome["refused"] == {"client-0002": {"tensors": 3}}
    assert [event["check"] for event in ended.of("refused")] == ["tensors"] * 3
    (line,) = faults({"runs": [outcome]})
    assert "refused 3 times, of 1 clients (client-0002: tensors 3)" in line


def test_the_progress_display_says_who_is_refused_benched_and_back(tmp_path):
    import io

    from rich.console import Console
    from toy_federation import toy_config

    from heterotune_flwr.reporting.progress import RunProgress

    ended = run(toy_spec("heterotune"), prepare=Hostile(("client-0002",), FAULTS["nan"]), rounds=6)
    text = io.StringIO()
    progress = RunProgress(toy_config(tmp_path, (4, 3, 3)), Console(file=text, width=200))
    named = {"strategy": "heterotune", "seed": 0}
    for event in ended.events:
        if event["event"] in ("refused", "cooldown", "returned"):
            progress({**named, **event})
    progress({**named, "event": "skipped", "round": 2, "usable": 1, "needed": 5})
    progress({**named, "event": "round_closed", "round": 3, "unawaited": ["client-0009"]})
    shown = text.getvalue()
    for line in (
        "refused client-0002: sends numbers in",
        "client-0002 failed too often: not asked until after round 5",
        "client-0002 is asked again",
        "round 2 skipped: 1 usable updates, 5 needed",
        "round 3 closed without waiting for client-0009",
    ):
        assert line in shown


def test_an_answer_that_comes_twice_counts_once():
    def twice(federation, grid):
        pull = grid.pull_messages

        def doubled(ids):
            return [message for message in pull(ids) for _ in range(2)]

        grid.pull_messages = doubled

    once, doubled = run(toy_spec("heterotune")), run(toy_spec("heterotune"), prepare=twice)
    assert doubled.loss() == once.loss()
    assert [e["clients"] for e in doubled.of("round")] == [10, 10, 10]


def test_an_answer_from_a_stranger_is_not_believed():
    def impostor(federation, grid):
        honest = grid.answer

        def answer(message, context):
            reply = honest(message, context)
            if message.metadata.message_type == "train":
                reply.metadata.__dict__["_src_node_id"] = 12345
            return reply

        grid.answer = answer

    with pytest.raises(Exception, match="node 12345 answered in its place"):
        run(toy_spec("heterotune"), prepare=impostor)


def test_what_a_client_says_of_its_failure_is_kept_short_and_printable():
    loud = error_content("\x1b[2J\x07 owned " * 10_000)
    talkative = answering("train", lambda _: loud, ["client-0001"])
    failed = run(toy_spec("heterotune"), prepare=talkative).of("client_failed")
    assert failed
    for event in failed:
        assert event["reason"].isprintable()
        assert len(event["reason"]) < 320


def test_a_reply_that_is_no_reply_is_quarantined():
    def nonsense(content):
        del content["metrics"]
        return content

    ended = run(toy_spec("heterotune"), prepare=answering("train", nonsense, ["client-0001"]))
    assert ended.strategy.outcome.to_json()["refused"] == {"client-0001": {"unreadable": 3}}


def test_an_answer_for_a_channel_that_nobody_asked_is_quarantined():
    def further(content):
        add_payloads(content, content["config"], {"gossip": Payload({"x": np.ones((4, 4))})})
        return content

    ended = run(toy_spec("heterotune"), prepare=answering("train", further, ["client-0001"]))
    assert ended.strategy.outcome.to_json()["refused"] == {"client-0001": {"unreadable": 3}}
    assert "'gossip', which was not asked" in ended.of("refused")[0]["reason"]
