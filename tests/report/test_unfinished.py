"""What is said of a run that a person stopped early: nothing that has not happened yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from seen import Seen

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.resume import FOLLOWER, run_lock
from heterotune_flwr.report.listing import lines, list_runs
from heterotune_flwr.report.page import run_page
from heterotune_flwr.report.read import read_facts
from heterotune_flwr.report.text import standing
from heterotune_flwr.reporting.status import read_status, render

KEY = {"strategy": "local_only", "seed": 0}
TYPE = "tiny-a@bf16"


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"event": kind, **fields}


def evaluated(number: int, accuracy: float) -> dict[str, Any]:
    means = {"clients": 2, "personal_accuracy_mean": accuracy, "personal_accuracy_worst10": 0.1}
    return event("evaluate", **KEY, round=number, tested=2, overall=means, types={TYPE: means})


def moved(kind: str, number: int, maps: int = 0) -> dict[str, Any]:
    sizes = {"up": 10, "down": 20 + maps, "maps": maps, "wire_up": 15, "wire_down": 30 + maps}
    return event("bytes", **KEY, round=number, message_type=kind, client_id="client-0000", **sizes)


STARTED = [
    event("journal", version=2, simulated=True),
    event("asking", seed=0),
    event("describe", clients=2, seed=0, labels=["yes", "no"]),
    event("align", seed=0, quality={}, bytes_up=7000),
    event("channel_off", **KEY, channel="text", reason="nothing to teach"),
    event("start", **KEY, clients=2),
    moved("evaluate", 0, maps=500),
    evaluated(0, 0.287),
    moved("train", 1),
    event("round", **KEY, round=1, clients=2, bytes_up=10, bytes_down=20),
]
STOPPED = event("failed", reason="interrupted")
CONFIG = {
    "run": {"name": "early", "seeds": [0], "compare": ["local_only", "heterotune"]},
    "server": {"rounds": 3},
}


def write(place: Path, events: list[dict[str, Any]], state: str = "failed") -> Path:
    place.mkdir(exist_ok=True)
    timed = [{**one, "time": 1000.0 + number} for number, one in enumerate(events)]
    (place / "rounds.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in timed))
    (place / "config.yaml").write_text(json.dumps(CONFIG))
    (place / "status.json").write_text(json.dumps({"state": state, "reason": "interrupted"}))
    return place


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    return write(tmp_path / "early", [*STARTED, STOPPED])


def test_a_channel_off_before_its_strategy_starts_is_no_thing_of_the_past(stopped: Path) -> None:
    assert not [one for one in read_facts(stopped).happenings if one.undone]
    going_on = [*STARTED, STOPPED, event("starting", what="a server")]
    found = read_facts(write(stopped, going_on, "running")).happenings
    assert next(one.text for one in found if one.kind == "failed").startswith("start 1 of the run")
    again = [*STARTED, STOPPED, STARTED[0], event("start", **KEY, clients=2)]
    found = read_facts(write(stopped, again)).happenings
    assert [one.kind for one in found if one.undone] == ["channel_off"]
    assert next(one.text for one in found if one.kind == "failed").startswith("start 1 of the run")


def test_the_first_test_is_of_the_untouched_model(stopped: Path) -> None:
    facts = read_facts(stopped)
    (row,) = (row for row in facts.side_by_side if row.type_key == "all")
    assert (row.kind, row.scores["accuracy"].mean) == ("bare", 0.287)
    (line,) = list_runs(stopped.parent)
    assert line.numbers == {}
    seen = Seen(run_page(facts))
    assert "28.7" in seen.text["models"]
    assert "untouched models reach 28.7" in seen.text["answer-results"]
    assert "in the last test of a strategy: there was none yet" in seen.text["mix"]


def test_a_test_between_rounds_is_what_it_has_reached(stopped: Path) -> None:
    write(stopped, [*STARTED, evaluated(1, 0.4)])
    rows = [row for row in read_facts(stopped).side_by_side if row.type_key == "all"]
    assert {row.kind: row.scores["accuracy"].mean for row in rows} == {"bare": 0.287, "alone": 0.4}
    assert list_runs(stopped.parent)[0].numbers == {"local_only": 0.4}
    alone = {**CONFIG, "run": {"seeds": [0], "compare": ["local_only"]}}
    (stopped / "config.yaml").write_text(json.dumps(alone))
    seen = Seen(run_page(read_facts(stopped)))
    assert "local only reaches 40.0" in seen.text["answer-results"]


def test_the_list_says_how_many_strategies_are_over(stopped: Path) -> None:
    def shown(*events: dict[str, Any]) -> str:
        write(stopped, [*STARTED, *events])
        return lines(list_runs(stopped.parent))[0]

    assert "0 of 2 strategies finished, round 1 of 3 of the next" in shown()
    over = shown(event("round", **KEY, round=3), event("strategy_end", **KEY))
    assert "1 of 2 strategies finished" in over
    assert "round" not in over


def test_the_page_says_how_it_ended_and_how_to_go_on(stopped: Path) -> None:
    text = Seen(run_page(read_facts(stopped))).text
    reached = "Reached: local only, 1 of 3 rounds; not begun: HeteroTune. The last word"
    assert f"numbers are those it had reached. {reached}" in text["answer-state"]
    assert "heterotune run --resume DIR" in text["answer-resumed"]
    assert "The run was interrupted; before that: nothing was" in text["answer-trouble"]


def test_of_real_machines_a_run_goes_on_by_their_command(stopped: Path) -> None:
    (stopped / "checkpoints").mkdir()
    (stopped / "checkpoints" / "local_only.npz").touch()
    assert any("heterotune run --resume" in line for line in standing(read_facts(stopped)))
    assert "heterotune run --resume" in read_status(stopped).going_on
    real = [event("journal", version=2, simulated=False), *STARTED[1:], STOPPED]
    facts = read_facts(write(stopped, real))
    assert "heterotune deploy run" in Seen(run_page(facts)).text["answer-resumed"]
    assert any("heterotune deploy run" in line for line in standing(facts))
    assert "heterotune deploy run" in render(read_status(stopped))


def test_status_and_report_agree_on_how_a_run_stands(stopped: Path) -> None:
    def states() -> set[str]:
        return {read_status(stopped).state, read_facts(stopped).identity.state}

    assert states() == {"interrupted"}
    assert "(interrupted)" not in render(read_status(stopped))
    write(stopped, STARTED, "running")
    assert states() == {"interrupted"}  # nobody holds its lock
    with run_lock(stopped):
        assert states() == {"running"}
    (stopped / "status.json").unlink()
    assert states() == {"unknown"}
    with run_lock(stopped, FOLLOWER):
        assert states() == {"starting", "running"}  # to a reader of the page it goes on


def test_no_place_on_this_machine_is_told(stopped: Path) -> None:
    reason = "/home/ann/secret/bank.npz cannot be written; see https://example.org/a/b, go on in ~/secret/run"
    failed = event("client_failed", **KEY, client_id="client-0000", round=1, reason=reason)
    write(stopped, [*STARTED, failed, event("data", notes=[reason])], "failed")
    (stopped / "status.json").write_text(json.dumps({"state": "failed", "reason": reason}))
    page = run_page(read_facts(stopped))
    assert "secret" not in page
    assert page.count("…/bank.npz cannot be written; see https://example.org/a/b") >= 4


def test_a_file_without_any_event_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "rounds.jsonl").write_bytes(b"\x00\xff\n\x07junk\n")
    with pytest.raises(ConfigError, match="is no journal"):
        read_facts(tmp_path / "junk")


def test_bytes_and_seconds_are_booked_where_they_belong(stopped: Path) -> None:
    aligning = event("progress", what="aligning", done=1, clients=2)
    facts = read_facts(write(stopped, [*STARTED[:3], aligning, *STARTED[3:], STOPPED]))
    (moved_so_far,) = facts.traffic
    assert (moved_so_far.one_time_up, moved_so_far.one_time_down) == (7000, 500)
    shared = {one.name for one in facts.phases if not one.strategy}
    assert shared <= {"starting", "asking", "aligning"}
    assert {one.name for one in facts.phases if one.strategy} >= {"training", "testing"}


def test_what_a_strategy_that_shares_nothing_trained_is_called_alone(stopped: Path) -> None:
    took = event("took_home", **KEY, client_id="client-0000", type=TYPE, took="federated")
    outcomes = read_facts(write(stopped, [*STARTED, took])).client_outcomes
    assert [one.took for one in outcomes] == ["alone"]
