"""What the facts say of a run with faults, a kill and a resume: against its files, and against what was done to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questions import QUESTIONS, Facts
from recorded import ASKED, CLIENTS, FAILING, LIE_ROUND, LYING, ROUNDS, SKIPPED, SPECS, SUBJECT, ids
from toy_model import LABELS


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Facts]:
    runs = json.loads((directory / "results.json").read_text())["runs"]
    return {run["strategy"]: run for run in runs}


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
