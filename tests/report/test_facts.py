"""What the facts say of a run with faults, a kill and a resume: against its files, and against what was done to it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questions import QUESTIONS
from recorded import ASKED, CLIENTS, FAILING, LIE_ROUND, LYING, ROUNDS, SKIPPED, SPECS, ids
from toy_model import LABELS

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.resume import run_lock
from heterotune_flwr.report.compare import compare, read_comparison
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.listing import list_runs
from heterotune_flwr.report.page import run_page
from heterotune_flwr.report.read import read_facts
from heterotune_flwr.report.tables import write_csv
from heterotune_flwr.reporting.status import read_status

Facts = dict[str, Any]
SUBJECT = "heterotune"


@pytest.fixture(scope="module")
def told(facts: RunFacts) -> Facts:
    """As ``report --json`` gives it."""
    found: Facts = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    return found


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Facts]:
    runs = json.loads((directory / "results.json").read_text())["runs"]
    return {run["strategy"]: run for run in runs}


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return shutil.copytree(directory, tmp_path / "copy")


def answer(name: str, told: Facts) -> Any:
    return QUESTIONS[name].answer(told)


def test_who_gained_and_who_lost(told: Facts, results: dict[str, Facts]) -> None:
    alone = {row["client_id"]: row["personal_accuracy"] for row in results["local_only"]["clients"]}
    rows = results[SUBJECT]["clients"]
    over = {row["client_id"]: row["personal_accuracy"] - alone[row["client_id"]] for row in rows}
    bare = {
        r["client_id"]: r["personal_accuracy"] - r["kept"]["bare"]["personal_accuracy"]
        for r in rows
    }
    assert answer("lost", told) == pytest.approx({c: gain for c, gain in over.items() if gain < 0})
    assert answer("gained", told) == pytest.approx(
        {c: gain for c, gain in bare.items() if gain > 0}
    )
    assert len(answer("gained", told)) > CLIENTS / 2
    assert answer("lost", told)


def test_why_a_client_is_out(told: Facts) -> None:
    out = answer("out", told)
    assert {FAILING} <= set(out) <= {FAILING, LYING}
    assert "failed too often" in out[FAILING]
    assert "the disk is full" in out[FAILING]


def test_what_travelled_in_which_direction(told: Facts, results: dict[str, Facts]) -> None:
    counted = results[SUBJECT]["bytes"]
    found = answer("travelled", told)
    assert all(found[name] == counted[name] > 0 for name in found)


def test_which_settings_were_left_as_they_were(told: Facts) -> None:
    found = answer("defaults", told)
    assert told["preset"] == ASKED.preset
    assert set(found["user"]) == set(ASKED.said)
    assert {"train.batch_size", "server.cooldown_longest"} <= set(found["default"])
    assert {"method.latent", "server.cooldown_after"} <= set(found["preset"])


def test_what_was_resumed(told: Facts) -> None:
    ((strategy, rounds),) = answer("resumed", told).items()
    assert strategy == SUBJECT
    assert rounds[0] in (SKIPPED, SKIPPED + 1)
    assert told["identity"]["resumed"] == 1
    assert [start["torn_line"] for start in told["identity"]["starts"]] == [False, True]
    assert told["identity"]["state"] == "finished"


def test_which_model_a_client_took(told: Facts) -> None:
    expected = {
        cid: ("federated", "bare")[number % 2] for number, cid in enumerate(ids(*range(CLIENTS)))
    }
    assert answer("took", told) == expected
    (all_types,) = (
        o for o in told["type_outcomes"] if (o["strategy"], o["type_key"]) == (SUBJECT, "all")
    )
    assert all_types["took"] == {"bare": 3, "alone": 0, "federated": 4}


def test_what_the_untouched_model_scored(told: Facts, results: dict[str, Facts]) -> None:
    before = [row["global_accuracy"] for row in results["local_only"]["clients_before"]]
    assert answer("untouched", told) == pytest.approx({"global": np.mean(before), "personal": 0.25})


def test_where_types_disagree(told: Facts, results: dict[str, Facts]) -> None:
    logged = {
        (slot, pair, entry["round"]): cosine
        for entry in results[SUBJECT]["rounds"]
        for slot, facts in entry.get("cmga", {}).items()
        for pair, cosine in facts["cosine_before"].items()
    }
    slot, pair, number, cosine = answer("disagree", told)
    assert logged[slot, pair, number] == cosine == min(logged.values())


def test_what_took_the_time(told: Facts, directory: Path) -> None:
    found = answer("time", told)
    assert {"asking", "aligning", "training", "testing"} <= set(found)
    times = [
        json.loads(x)["time"]
        for x in (directory / "rounds.jsonl").read_text().splitlines()
        if '17"' not in x and x.endswith("}")
    ]
    stopped = sum(p["seconds"] for p in told["phases"] if p["name"] == "stopped")
    assert sum(found.values()) == pytest.approx(times[-1] - times[0] - stopped)
    assert all(p["strategy"] == "" for p in told["phases"] if p["name"] in ("asking", "aligning"))


def test_what_went_wrong_is_told_in_sentences(told: Facts) -> None:
    said = [(h["kind"], h["strategy"], h["round"], h["text"]) for h in told["happenings"]]
    assert ("refused", SUBJECT, LIE_ROUND) in {entry[:3] for entry in said}
    assert ("skipped", SUBJECT, SKIPPED) in {entry[:3] for entry in said}
    assert any(f"an update of {LYING} was refused: sends numbers" in entry[3] for entry in said)
    assert [run["skipped_rounds"] for run in told["runs"]] == [[SKIPPED]] * len(SPECS)


def test_models_stand_side_by_side_and_what_was_not_run_is_absent(
    told: Facts, results: dict[str, Facts]
) -> None:
    rows = [r for r in told["side_by_side"] if (r["type_key"], r["scope"]) == ("all", "personal")]
    assert [row["kind"] for row in rows] == [
        "bare",
        "majority",
        "alone",
        "within_type",
        "federated",
    ]
    for row in rows[2:]:
        overall = results[row["strategy"]]["overall"]
        measured = row["scores"]["accuracy"]
        for part in ("mean", "std", "worst", "worst10"):
            assert measured[part] == pytest.approx(overall[f"personal_accuracy_{part}"]), part
    assert "rouge_l" not in rows[-1]["scores"]


def test_labels_their_mix_and_what_is_mistaken(told: Facts, results: dict[str, Facts]) -> None:
    clients = {client["client_id"]: client for client in told["clients"]}
    assert all(list(client["label_mix"]) == list(LABELS) for client in clients.values())
    assert all(
        sum(client["label_mix"].values()) == client["examples"] for client in clients.values()
    )
    (table,) = (
        c for c in told["confusions"]
        if (c["strategy"], c["scope"], c["type_key"]) == (SUBJECT, "personal", "all")
    )  # fmt: skip
    counts = np.array(table["counts"])
    assert counts.sum() == table["examples"] == 20 * CLIENTS
    assert table["accuracy"] == pytest.approx(results[SUBJECT]["overall"]["personal_accuracy_mean"])
    precision = np.diag(counts) / np.maximum(counts.sum(axis=0), 1)
    recall = np.diag(counts) / np.maximum(counts.sum(axis=1), 1)
    expected = np.mean(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert table["macro_f1"] == pytest.approx(expected)
    majority = next(
        r for r in told["side_by_side"] if (r["kind"], r["scope"]) == ("majority", "personal")
    )
    assert 0 < majority["scores"]["accuracy"]["mean"] < 1


def test_curves_run_over_rounds_and_bytes(told: Facts, results: dict[str, Facts]) -> None:
    for name in SPECS:
        (curve,) = (
            c
            for c in told["curves"]
            if (c["strategy"], c["measure"], c["type_key"]) == (name, "train_loss", "all")
        )
        assert curve["rounds"] == [number for number in range(1, ROUNDS + 1) if number != SKIPPED]
        assert curve["bytes"] == sorted(curve["bytes"])
        counted = results[name]["bytes"]
        assert curve["bytes"][-1] == counted["train_up"] + counted["train_down"]


def test_a_run_whose_results_are_gone_is_told_by_its_journal(copy: Path, told: Facts) -> None:
    (copy / "results.json").unlink()
    found = read_facts(copy).to_json()
    assert any("results.json is missing" in line for line in found["trouble"])
    assert answer("took", found) == answer("took", told)
    assert answer("disagree", found) == answer("disagree", told)
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


def test_several_runs_compare_by_name_and_by_what_differs(directory: Path, copy: Path) -> None:
    found = json.loads((copy / "results.json").read_text())
    found["config"]["train"]["local_steps"] = 99
    (copy / "results.json").write_text(json.dumps(found))
    compared = read_comparison([directory, copy])
    first, second = compared.runs
    assert {first, second} == {directory.name, copy.name}
    assert compared.settings == {"train.local_steps": {first: 6, second: 99}}
    assert list(compare([compared.runs[first]]).runs) == ["toy"]


def test_tables_are_flat_files(facts: RunFacts, told: Facts, tmp_path: Path) -> None:
    paths = {path.stem: path for path in write_csv(facts, tmp_path / "tables")}
    with paths["client_outcomes"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(told["client_outcomes"])
    assert rows[0]["models.federated.personal.accuracy"] == str(
        told["client_outcomes"][0]["models"]["federated"]["personal"]["accuracy"]
    )
    assert rows[0]["models.untouched.personal.accuracy"] == str(
        told["client_outcomes"][0]["models"]["bare"]["personal"]["accuracy"]
    )
    assert not any(
        "bare" in line for path in paths.values() for line in path.open().readline().split(",")
    )
    with paths["confusions"].open() as stream:
        assert sum(int(row["count"]) for row in csv.DictReader(stream)) == sum(
            table["examples"] for table in told["confusions"]
        )


def test_a_run_in_a_folder_of_its_own_is_listed_by_its_path(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "out").symlink_to(directory)
    assert [line.name for line in list_runs(tmp_path)] == ["mine/out"]


def test_a_cell_is_never_a_formula(facts: RunFacts, tmp_path: Path) -> None:
    facts.happenings[0].reason, kept = "=HYPERLINK(1)", facts.happenings[0].reason
    paths = {path.stem: path for path in write_csv(facts, tmp_path)}
    facts.happenings[0].reason = kept
    assert ",'=HYPERLINK(1)," in paths["happenings"].read_text()


def test_the_list_of_runs(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "rounds.jsonl").write_text("nothing\n")
    (tmp_path / "no run").mkdir()
    (tmp_path / "first").symlink_to(directory)
    first, broken = list_runs(tmp_path)
    assert (first.name, first.state, first.strategies) == ("first", "finished", list(SPECS))
    assert first.rounds_done == first.rounds == ROUNDS
    assert set(first.numbers) == set(SPECS)
    assert first.bytes_on_disk > 10_000
    assert (broken.name, broken.state, broken.numbers) == ("broken", "unreadable", {})
    assert "is no journal" in broken.reason
    with pytest.raises(ConfigError, match="cannot be listed"):
        list_runs(tmp_path / "nowhere")


def test_the_commands(
    heterotune: Callable[..., Any], directory: Path, tmp_path: Path, told: Facts
) -> None:
    done = heterotune("report", directory, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, told)
    shown = heterotune("report", directory, "--text")
    assert "Accuracy (%) on the global test" in shown.stdout
    assert f"an update of {LYING} was refused" in shown.stdout
    assert "started 2 times" in shown.stdout
    assert not (directory / "report.html").exists()
    page = tmp_path / "page.html"
    assert heterotune("report", directory, "--page", page).returncode == 0
    assert "</html>" in page.read_text()
    both = heterotune("report", directory, directory, "--json")
    assert len(json.loads(both.stdout)["runs"]) == 2
    listed = heterotune("runs", directory.parent)
    assert (
        f"HeteroTune {100 * told['type_outcomes'][8]['after']['personal']['accuracy']['mean']:.1f} %"
        in listed.stdout
    )
    assert heterotune("report", tmp_path).returncode == 1


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
