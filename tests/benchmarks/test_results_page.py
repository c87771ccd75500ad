"""The results page is what its command makes: nobody edits a number by hand."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks import runner
from benchmarks.report import headline, page, readme
from benchmarks.runner import RESULTS, merged, paired_gain, table
from benchmarks.science import headline as science
from benchmarks.science.ngrams import plain


def test_the_page_and_the_headline_are_what_the_command_makes():
    assert page.PATH.read_text() == page.text(), "run python -m benchmarks.report"
    assert readme.PATH.read_text() == readme.text(), "run python -m benchmarks.report"
    assert "| **HeteroTune** |" in readme.measured()
    made = headline.markdown(headline.suites_of())
    assert (RESULTS / "headline.md").read_text() == made, "run python -m benchmarks.report"


def test_every_result_names_a_command_that_is_there():
    for path in sorted(RESULTS.glob("*.json")):
        values = json.loads(path.read_text())
        if path.stem.endswith("_cells"):
            continue
        commands = values["command"].split("; ")
        assert commands, path
        for command in commands:
            assert importlib.util.find_spec(command.removeprefix("python -m ")), (path, command)


def test_tables_have_at_most_six_columns():
    assert table(["a", "b"], [[1, 2.5]]) == "| a | b |\n|---|---|\n| 1 | 2.5 |"
    with pytest.raises(ValueError, match="7 columns"):
        table(list("abcdefg"), [])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table(["a", "b"], [[1]])


def test_results_are_joined_at_every_depth():
    assert merged({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}) == {
        "a": {"x": 1, "y": 3}, "b": 1, "c": 4,
    }  # fmt: skip


def test_a_gain_is_paired_and_drawn_by_cells():
    a = {(0, "t", "c0"): 3.0, (0, "t", "c1"): 5.0, (1, "t", "c0"): 4.0, (2, "t", "c0"): 9.0}
    b = {(0, "t", "c0"): 1.0, (0, "t", "c1"): 5.0, (1, "t", "c0"): 2.0}
    gain = paired_gain(a, b)
    assert gain["gain"] == pytest.approx(4 / 3, abs=1e-3)
    assert gain["clients_helped"] == pytest.approx(2 / 3, abs=1e-3)
    assert gain["low"] >= 1.0  # cells have 1 and 2; single clients would reach down to 0
    assert gain["high"] <= 2.0


def test_n_grams_are_of_letters_and_digits_with_the_ends_of_words():
    assert plain("A b!") == " a b "
    assert plain("Größe-Я") == " größe я "
    view = (
        pytest.importorskip("sklearn")
        and importlib.import_module("benchmarks.science.ngrams").NgramView
    )
    texts = [f"package {index} of words number {index % 7}" for index in range(60)]
    z = view(texts, 4).of_texts(texts)
    assert z.shape == (60, 4)
    assert z.std(axis=0) == pytest.approx([1.0] * 4, abs=1e-3)


def test_the_headline_goes_on_where_it_was_stopped(monkeypatch):
    """First the rates with seeds of their own, then the best one; what is there is not measured again."""
    cells = {}

    def measured(rates, seeds):
        for rate in rates:
            for seed in seeds:
                row = {"global_accuracy": 0.5 - abs(rate - 4e-3)}
                cells[science.key("bank3", "bank", rate, seed)] = {"clients": [row]}

    monkeypatch.setattr(science.CELLS, "read", lambda: dict(cells))
    assert science.best_rate("bank3", "bank", cells) is None
    runs = science.missing("bank3", "bank", [20, 21])
    rates, seeds = next(runs)
    assert (list(rates), seeds) == ([2e-3, 4e-3, 8e-3], (7, 8, 9))
    measured(rates, seeds)
    assert next(runs) == ([4e-3], [20, 21])
    measured([4e-3], [20])
    assert list(science.missing("bank3", "bank", [20, 21])) == [([4e-3], [21])]
    measured([4e-3], [21])
    assert list(science.missing("bank3", "bank", [20, 21])) == []


def test_cells_are_kept_as_they_are_done_and_forgotten_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    cells = runner.Cells("some_cells")
    cells.keep({"a|x": 1})
    cells.keep({"b|x": 2, "a|x": 3})
    assert cells.read() == {"a|x": 3, "b|x": 2}
    cells.forget(lambda name: name.startswith("a"))
    assert cells.read() == {"b|x": 2}


def test_results_of_several_commands_share_a_file_and_other_seeds_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    for name, values in (("one", {"seeds": [1], "a": {"x": 1}}), ("two", {"a": {"y": 2}})):
        monkeypatch.setattr(runner, "command", lambda name=name: f"python -m {name}")
        runner.write_results("shared", values)
    assert runner.read_results("shared") == {"seeds": [1], "a": {"x": 1, "y": 2}}
    assert runner.load_results("shared")["command"] == "python -m one; python -m two"
    with pytest.raises(SystemExit, match="other seeds"):
        runner.write_results("shared", {"seeds": [2]})
    runner.write_results("shared", {"seeds": [2]}, anew=True)
    assert runner.read_results("shared") == {"seeds": [2]}
