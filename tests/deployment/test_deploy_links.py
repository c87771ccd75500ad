"""The audit of a journal finds what must not be; a leak is told from restarts."""

from __future__ import annotations

import json

import pytest

from benchmarks.deployment.journal_audit import audit
from benchmarks.deployment.kills import aggregates
from benchmarks.deployment.runs import NODES
from benchmarks.deployment.soak import Sample, growth_in_calm, growth_under_fire


def event(name, number=0, **fields):
    return {"event": name, "round": number, **fields}


def round_of(number, clients=("a", "b"), safe=True):
    answers = [event("train_reply", number, client_id=client) for client in clients]
    end = [event("round", number, clients=len(clients))]
    return [*answers, *end, *([event("checkpoint", number)] if safe else [])]


def test_a_whole_journal_has_no_faults():
    events = [event("start"), event("checkpoint", 0), *round_of(1), *round_of(2)]
    book = audit(events, 2)
    assert (book.rounds, book.faults, book.lost, book.starts) == ([1, 2], [], 0, 1)


def test_a_round_done_again_after_a_death_is_no_fault():
    before = [event("start"), *round_of(1), *round_of(2, safe=False)]
    after = [event("start"), event("resumed", 1), *round_of(2), *round_of(3)]
    book = audit([*before, *after], 3)
    assert (book.rounds, book.faults, book.redone, book.starts) == ([1, 2, 3], [], 1, 2)


def test_a_checkpoint_whose_line_a_death_took_is_no_fault():
    before = [event("start"), *round_of(1, safe=False)]
    book = audit([*before, event("start"), event("resumed", 1), *round_of(2)], 2)
    assert (book.rounds, book.faults) == ([1, 2], [])


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([event("start"), *round_of(1), *round_of(3)], "round 3 follows round 1"),
        ([event("start"), *round_of(1), *round_of(1)], "round 1 follows round 1"),
        ([event("start"), *round_of(1, ("a", "a"))], "two answers of a"),
        ([event("start"), *round_of(1), event("train_reply", 1, client_id="c")], "while round 2"),
        ([event("start"), event("round", 1, clients=1)], "1 updates of 0 answers"),
        ([event("start"), *round_of(1), *round_of(2), event("start"), event("resumed", 1)], "but round 2 was safe"),
        ([event("start"), *round_of(1), event("start"), *round_of(1)], "round 1 follows round 1"),
        ([event("start"), event("checkpoint", 4)], "checkpoint of round 4"),
        ([event("start"), event("resumed", 1)], "which the journal does not have"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_found(events, said):
    assert any(said in fault for fault in audit(events).faults)


def test_a_skipped_round_counts_as_lost_and_a_missing_end_is_a_fault():
    book = audit([event("start"), *round_of(1), event("skipped", 2)], 3)
    assert book.lost == 1
    assert book.faults == ["the journal ends with round 2, not 3"]


def samples(growth_mb_per_minute, lives=(0.0,)):
    """A process that has 100 MB when it begins and grows; it is replaced at these times."""
    found = []
    for time in range(0, 1800, 5):
        born = max(begin for begin in lives if begin <= time)
        age = time - born
        rss = 100 + growth_mb_per_minute * age / 60
        found.append(Sample("worker", "n1", int(born), age, time, rss))
    return found


def test_growth_over_restarts_is_not_taken_for_a_leak_and_a_leak_in_calm_is_seen():
    deaths = list(range(0, 1800, 200))
    assert growth_under_fire(samples(3.0, deaths), 1800) == {"worker": 0.0}
    (grown,) = growth_in_calm(samples(3.0), 0, 1800).values()
    # 3 MB a minute for the last 20 minutes, from 130 MB on.
    assert grown == pytest.approx(100 * 60 / 130, rel=0.01)
    assert growth_in_calm(samples(0.0), 0, 1800) == {"worker": 0.0}


def test_what_each_restart_starts_with_may_grow_and_is_seen():
    leaking = [
        Sample(s.kind, s.unit, s.pid, s.age, s.time, s.rss + s.time / 100)
        for s in samples(0.0, list(range(0, 1800, 200)))
    ]
    assert growth_under_fire(leaking, 1800)["worker"] > 5


def test_the_moment_of_aggregation_is_between_the_last_answer_and_the_checkpoint():
    def text(*names):
        return "".join(json.dumps({"event": name, "round": 2}) + "\n" for name in names)

    answered = ("checkpoint", *["train_reply"] * len(NODES))
    assert aggregates(text(*answered))
    assert aggregates(text(*answered, "round"))
    assert not aggregates(text(*answered, "round", "checkpoint"))
    assert not aggregates(text(*answered[:-1]))
    assert not aggregates(text(*answered, "checkpoint", "train_reply"))
