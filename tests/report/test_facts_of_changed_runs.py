"""What the facts say of a run that lacks something, was damaged, stopped, or went otherwise than the recorded one."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from questions import QUESTIONS, Facts
from recorded import ROUNDS, SPECS, SUBJECT
from typer.testing import CliRunner

from heterotune_flwr.cli import app
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.resume import run_lock
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.page import run_page
from heterotune_flwr.report.read import read_facts
from heterotune_flwr.reporting.status import read_status


def test_a_run_whose_results_are_gone_is_told_by_its_journal(copy: Path, told: Facts) -> None:
    (copy / "results.json").unlink()
    found = read_facts(copy).to_json()
    assert any("results.json is missing" in line for line in found["trouble"])
    for name in ("took", "disagree"):
        assert QUESTIONS[name].answer(found) == QUESTIONS[name].answer(told)
    assert [run["state"] for run in found["runs"]] == ["finished"] * 3
    assert [c["values"] for c in found["curves"]] == [c["values"] for c in told["curves"]]
    assert found["confusions"] == []


def test_a_finished_run_that_goes_on_with_more_rounds_is_unfinished_until_their_end(
    copy: Path,
) -> None:
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        settings.replace(f"rounds: {ROUNDS}\n", f"rounds: {ROUNDS + 4}\n")
    )
    own = {"strategy": SUBJECT, "seed": 0, "time": 2e9}
    added = [
        {"event": "starting", "what": "Flower's server", "torn_line": True, "time": 2e9},
        {"event": "journal", "version": 2, "torn_line": False, "time": 2e9},
        {**own, "event": "start", "of": ROUNDS + 4},
        {**own, "event": "resumed", "round": ROUNDS, "of": ROUNDS + 4},
        {**own, "event": "round", "round": ROUNDS + 1, "loss": 1.0},
    ]
    with (copy / "rounds.jsonl").open("a") as journal:
        journal.writelines(f"{json.dumps(event)}\n" for event in added)
    found = read_facts(copy)
    states = {run.strategy: (run.state, run.rounds_done) for run in found.runs}
    assert states[SUBJECT] == ("unfinished", ROUNDS + 1)
    assert {state for name, (state, _) in states.items() if name != SUBJECT} == {"finished"}
    assert {run.rounds_planned for run in found.runs} == {ROUNDS + 4}
    assert [start.torn_line for start in found.identity.starts] == [False, True, True]


def test_a_run_killed_in_its_middle_is_interrupted_and_rounds_done_again_count_once(
    copy: Path, told: Facts
) -> None:
    journal = copy / "rounds.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"resumed"' in line)
    again = json.dumps(
        {"event": "round", "time": 1.0, "strategy": SUBJECT, "seed": 0, "round": 4, "loss": 99.0}
    )
    journal.write_text("".join([*lines[: at - 1], f"{again}\n", *lines[at - 1 :]]))
    losses = [
        max(c["values"])
        for c in read_facts(copy).to_json()["curves"]
        if c["measure"] == "train_loss"
    ]
    assert max(losses) < 99
    journal.write_text("".join(lines[: at - 2]))
    (copy / "results.json").unlink()
    (copy / "status.json").write_text('{"state": "running"}')
    found = read_facts(copy)
    assert found.identity.state == "interrupted"
    assert {run.strategy: run.state for run in found.runs} == dict.fromkeys(SPECS, "finished") | {
        SUBJECT: "unfinished"
    }
    assert next(t for t in found.traffic if t.strategy == SUBJECT).partial
    assert not [o for o in found.client_outcomes if o.strategy == SUBJECT]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "{"),
        ("results.json", '{"runs": [1, {"strategy": 5, "clients": 3, "bytes": [], "rounds": {"a": 1}}]}'),
        ("rounds.jsonl", "\x00[]\n" + "[" * 9000 + '\n{"event": []}\n{"event": "round", "types": 3, "cmga": [1]}\n'),
        ("config.yaml", "a: [b\n"),
        ("status.json", "[]"),
        ("run.json", "nothing"),
    ],
)  # fmt: skip
def test_damaged_files_are_told_and_never_end_a_report(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    found = read_facts(copy)
    json.dumps(found.to_json(), allow_nan=False)
    assert found.identity.strategies or name == "rounds.jsonl"
    assert found.trouble or name == "status.json"


@pytest.mark.parametrize(
    ("status", "held", "state"),
    [
        ({"state": "running"}, True, "running"),
        ({"state": "running"}, False, "interrupted"),
        ({"state": "failed", "reason": "interrupted"}, False, "interrupted"),
        ({"state": "failed", "reason": "the ServerApp was told to end; ..."}, False, "interrupted"),
        ({"state": "failed", "reason": "no memory"}, False, "failed"),
        ({"state": "finished"}, False, "finished"),
        (None, False, "finished"),  # the journal's last word
        (None, True, "running"),
    ],
)
def test_how_a_run_stands(copy: Path, status: Facts | None, held: bool, state: str) -> None:
    (copy / "status.json").unlink()
    if status is not None:
        (copy / "status.json").write_text(json.dumps(status))
    with run_lock(copy) if held else nullcontext():
        assert read_facts(copy).identity.state == state


def changed(copy: Path, change: Callable[[Facts], None]) -> RunFacts:
    """The facts of a run whose results are others."""
    found = json.loads((copy / "results.json").read_text())
    change(found)
    (copy / "results.json").write_text(json.dumps(found))
    return read_facts(copy)


def test_what_nodes_do_not_tell_is_absent_and_said(copy: Path) -> None:
    def forget(found: Facts) -> None:
        for run in found["runs"]:
            for row in run["clients"]:
                del row["details"]

    facts = changed(copy, forget)
    assert facts.confusions == []
    assert {client.label_mix for client in facts.clients} == {None}
    assert not [
        row for row in facts.side_by_side if row.kind == "majority" or "macro_f1" in row.scores
    ]
    assert any("its owner allows" in line for line in facts.untold)


def test_sampled_answers_of_open_text(copy: Path) -> None:
    answer = {"prompt": "a", "reference": "b", "bare": "c", "federated": "d"}

    def speak(found: Facts) -> None:
        found["config"]["train"]["loss"] = "tokens"
        found["runs"][-1]["clients"][0]["details"] = {"answers": [answer]}

    facts = changed(copy, speak)
    (shown,) = facts.answers
    assert facts.identity.task == "text"
    assert (shown.client_id, shown.strategy) == ("client-0000", SUBJECT)
    assert (shown.prompt, shown.reference) == ("a", "b")
    assert shown.answers == {"bare": "c", "federated": "d"}


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        read_facts(tmp_path)


def test_the_wait_for_clients_and_their_maps_is_no_test(copy: Path, told: Facts) -> None:
    journal = copy / "rounds.jsonl"
    events = read_events(journal)
    at = next(n for n, event in enumerate(events) if event["event"] == "asking")
    began = events[at]["time"]
    waits = [
        {"event": "progress", "what": what, "done": 1, "clients": 2, "time": began + seconds}
        for what, seconds in (("connecting", 100), ("aligning", 300))
    ]
    later = [{**event, "time": event["time"] + 300} for event in events[at + 1 :]]
    journal.write_text(
        "".join(f"{json.dumps(event)}\n" for event in [*events[: at + 1], *waits, *later])
    )
    seconds: dict[str, float] = {}
    for phase in read_facts(copy).phases:
        seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds
    before = sum(p["seconds"] for p in told["phases"] if p["name"] == "testing")
    assert seconds["testing"] == pytest.approx(before, abs=1)
    assert seconds["asking"] >= 100
    assert seconds["aligning"] >= 200


@pytest.mark.parametrize("instead", [None, "asked"])  # an unreleased program wrote it as `asked`
def test_without_a_word_on_settings_nobody_is_said_to_have_chosen_them(
    copy: Path, instead: str | None
) -> None:
    journal = copy / "rounds.jsonl"
    kept = []
    for line in journal.read_text().splitlines(keepends=True):
        if '"said"' not in line:
            kept.append(line)
        elif instead:
            kept.append(line.replace('"settings"', f'"{instead}"', 1))
    journal.write_text("".join(kept))
    assert {setting.origin for setting in read_facts(copy).settings} == {"unknown"}
    assert read_status(copy).state == "finished"


def test_the_page_says_of_own_data_no_place_on_this_machine(copy: Path) -> None:
    found = json.loads((copy / "results.json").read_text())
    found["config"]["data"]["train"] = "/home/ann/secret-project/reviews.csv"
    (copy / "results.json").write_text(json.dumps(found))
    facts = read_facts(copy)
    assert facts.identity.data.startswith("…/reviews.csv")
    assert "secret-project" not in run_page(facts)


DAMAGE = [1e308, 10**400, -1e12, "many", None, [[]], {"a": {"b": 1}}]


@pytest.mark.parametrize(
    "value", DAMAGE, ids=[f"{type(value).__name__}{n}" for n, value in enumerate(DAMAGE)]
)
def test_whatever_stands_in_the_place_of_numbers_a_report_is_made(copy: Path, value: Any) -> None:
    def damaged(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: damaged(one) for key, one in found.items()}
        if isinstance(found, list):
            return [damaged(one) for one in found]
        return value if isinstance(found, int | float) and not isinstance(found, bool) else found

    events = map(damaged, read_events(copy / "rounds.jsonl"))
    (copy / "rounds.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in events))
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(damaged(results)))
    done = CliRunner().invoke(app, ["report", str(copy)])
    assert done.exit_code == 0, done.exception
    assert (copy / "report.html").read_text().rstrip().endswith("</html>")
