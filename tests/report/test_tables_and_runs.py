"""Facts as tables, several runs side by side, the list of runs, and the commands that show them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from questions import Facts
from recorded import LYING, ROUNDS, SPECS

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.report.compare import compare, read_comparison
from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.listing import list_runs
from heterotune_flwr.report.tables import write_csv


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
