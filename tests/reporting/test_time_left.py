"""How long a run still takes: the last test counts, and so do the strategies that have not begun."""

from __future__ import annotations

import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.reporting.time_left import Plan, TimeLeft


def rounds(count, seconds, of, at=0.0, before=5.0, strategy="heterotune"):
    """A strategy's events with a test of ``before`` seconds and rounds of ``seconds`` each."""
    yield {"event": "start", "time": at, "strategy": strategy, "of": of}
    yield {"event": "evaluate", "time": at + before, "round": 0}
    for number in range(1, count + 1):
        yield {
            "event": "round",
            "time": at + before + number * seconds,
            "round": number,
            "client_seconds": 2.0,
        }


def after(events, plan):
    left = TimeLeft(plan)
    for event in events:
        left.take(event)
    return left


def test_the_last_test_counts():
    left = after(rounds(4, 10.0, 10), Plan())
    assert left.seconds(45.0) == pytest.approx(6 * 10 + 5)
    done = after(rounds(10, 10.0, 10), Plan())
    assert done.seconds(105.0) == pytest.approx(5)
    # Everybody trains alone: ten rounds of two seconds of work, two more after the run's; four models are tested.
    assert after(rounds(10, 10.0, 10), Plan(take_home=True)).seconds(105.0) == pytest.approx(
        4 * 5 + 0.4 * 12 * 2
    )


def test_tests_between_count_and_so_do_later_strategies():
    assert after(rounds(4, 10.0, 10), Plan(evaluate_every=3)).seconds(45.0) == pytest.approx(
        60 + 2 * 5 + 5
    )
    events = [*rounds(10, 10.0, 10), {"event": "evaluate", "time": 110.0, "round": 10}]
    ended = {"event": "strategy_end", "time": 110.0}
    assert after([*events, ended], Plan(experiments=3)).seconds(110.0) == pytest.approx(2 * 110)
    between = after([*events, ended], Plan(experiments=3))
    assert (
        between.seconds(110.0 + 221) is None
    )  # what the next one needs first takes longer than two
    assert between.number == 1
    assert between.share(110.0, 0.0) == pytest.approx(1 / 3)
    assert after(events, Plan(experiments=3)).share(110.0, -1e6) <= 1 / 3  # others are to come
    second = rounds(10, 10.0, 10, at=110.0)
    assert after([*events, ended, *second], Plan(experiments=3)).seconds(215.0) == pytest.approx(
        5 + 110
    )
    assert after([*events, ended], Plan()).seconds(110.0) == 0


def test_a_long_test_is_reckoned_by_who_has_answered():
    asked = {"event": "asked", "message_type": "evaluate", "asked": ["a", "b", "c", "d"]}
    left = after([*rounds(10, 10.0, 10), asked], Plan())
    assert left.seconds(175.0) == 0  # longer than any test before: nobody can tell
    left.take({"event": "bytes", "client_id": "a"})
    assert left.seconds(185.0) == pytest.approx(3 * 80)


def test_nobody_can_tell_before_the_first_round():
    assert after([], Plan()).seconds(1.0) is None
    assert after(rounds(0, 1.0, 10), Plan()).seconds(7.0) is None
    left = after(rounds(5, 10.0, 10), Plan())
    assert left.share(55.0, began=0.0) == pytest.approx(55 / (55 + 55))


def test_a_plan_is_read_off_the_configuration():
    plan = Plan.of(compose("demo", ["server.evaluate_every=4", "run.seeds=[0,1]"]))
    assert (plan.experiments, plan.take_home) == (6, True)
    assert [plan.tests_between(done, 12) for done in (0, 3, 4, 11)] == [2, 2, 1, 0]
