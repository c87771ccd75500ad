"""The journal against its documentation: whatever a run writes is in docs/journal.md, field by field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.errors import FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import VERSION, Journal, read_events

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "journal.md").read_text()
HERE = "heterotune_flwr.strategies"


def documented(optional: bool = False) -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|(.*)\|$", PAGE, flags=re.MULTILINE)
    outer = {name: re.sub(r"\([^()]*\)", "", fields) for name, fields in rows}
    mark = r"`(\w+)`" if optional else r"`(\w+)`(?!\?)"
    return {name: set(re.findall(mark, fields)) for name, fields in outer.items()}


def test_every_event_of_the_code_is_documented():
    calls = r"(?:\.event\(|append_event\([^,]+, |\b_?tell\()\s*\"(\w+)\""
    refusals = r"\._?refuse\([^()]*(?:\([^()]*\))?[^()]*, \"(\w+)\""
    called = re.compile(f"{calls}|{refusals}")
    found = {"refused"}
    for path in (ROOT / "heterotune_flwr").rglob("*.py"):
        for one, other in called.findall(path.read_text()):
            found.add(one or other)
    assert len(found) > 12
    assert found == set(documented())
    assert f"## Events, version {VERSION}" in PAGE


def test_every_event_of_a_run_has_the_documented_fields(tmp_path):
    config = toy_config(tmp_path, (2, 1, 1), {"heterotune": {"_component_": f"{HERE}.HeteroTune"}})
    federation = ToyFederation(
        config,
        nan={("client-0000", 1)},
        fail={("client-0001", 2)},
        lose_evaluation={("client-0002", 3)},
    )
    journal = Journal(Path(config.run.dir))
    run_strategies(federation.grid(), config, journal, "toy-0")
    pages = documented()
    free = {"train_reply", "round", "evaluate"}  # metrics come and go; what is promised is below
    promised = {
        "round": {"clients", "loss", "types", "bytes_up", "bytes_down", "cmga", "client_seconds"},
        "evaluate": {"overall", "types"},
        "train_reply": {"client_id", "type", "loss", "seconds", "steps", "examples"},
    }
    kinds = set()
    for event in read_events(journal.path):
        kind = event["event"]
        kinds.add(kind)
        fields = set(event) - {"event", "time"}
        assert promised.get(kind, pages[kind]) <= fields, kind
        if kind not in free:
            assert fields <= documented(optional=True)[kind], kind
    assert {"journal", "describe", "align", "start", "bytes", "refused", "client_failed"} <= kinds


def test_events_tell_the_bytes_of_every_message(tmp_path):
    config = toy_config(tmp_path, (1, 1, 1), {"heterotune": {"_component_": f"{HERE}.HeteroTune"}})
    journal = Journal(Path(config.run.dir))
    results = run_strategies(ToyFederation(config).grid(), config, journal, "toy-0")
    told = [e for e in read_events(journal.path) if e["event"] == "bytes"]
    counts = results["runs"][0]["bytes"]
    trained = [e for e in told if e["message_type"] == "train"]
    assert len(trained) == counts["client_rounds"] == 9
    assert sum(e["up"] for e in trained) == counts["train_up"]
    assert sum(e["down"] - e["maps"] for e in trained) == counts["train_down"]
    assert sum(e["wire_up"] for e in told) == counts["wire_up"]
    assert all(e["wire_up"] >= e["up"] > 0 for e in trained)
    assert set(counts["types"]) == {e["type"] for e in trained}


def test_a_disk_that_refuses_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FederationError, match="Not a directory"):
        Journal(tmp_path / "file" / "run")


def test_a_display_that_fails_stops_neither_the_run_nor_the_journal(tmp_path, caplog):
    def broken(event):
        raise BrokenPipeError("nobody reads")

    journal = Journal(tmp_path, broken)
    journal.event("round", round=1)
    assert [event["event"] for event in read_events(journal.path)][-2:] == ["journal", "round"]
    assert caplog.text.count("nobody reads") == 1
