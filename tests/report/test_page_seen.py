"""The page in a real browser: light and dark, phone and desktop. Nothing missing, empty, overlapping or unreadable."""

from __future__ import annotations

import os
from pathlib import Path

import made_up
import pytest

from benchmarks.report.browser import browser, look, picture
from heterotune_flwr.report.facts import Comparison
from heterotune_flwr.report.page import comparison_page, run_page

PAGES = {
    "full": lambda: run_page(made_up.full()),
    "hostile": lambda: run_page(made_up.full(hostile=True)),
    "few labels": lambda: run_page(made_up.full(clients=60, labels=("no", "yes"))),
    "text": lambda: run_page(made_up.text_run()),
    "begun": lambda: run_page(made_up.begun("demo-2848053359689613866")),
    "compared": lambda: comparison_page(
        Comparison({"first": made_up.full(), "begun": made_up.begun()})
    ),
}

LOOK = (Path(__file__).parent / "look.js").read_text()


def test_nothing_is_missing_overlapping_or_unreadable_and_nothing_is_fetched(tmp_path):
    """One test, so that one browser starts, however many processes share the tests."""
    pictures = os.environ.get(
        "HETEROTUNE_TESTS_PICTURES"
    )  # a folder, for a person who wants to look too
    problems = {}
    with browser() as opened:
        for name, make in PAGES.items():
            page = tmp_path / f"{name}.html"
            page.write_text(make(), encoding="utf-8")
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    look(opened, page, width, scheme)
                    if found := opened.execute_script(LOOK, width):
                        problems[name, width, scheme] = found
                    if pictures:
                        picture(opened, Path(pictures) / f"{name}-{width}-{scheme}.png")
    assert not problems, "\n".join(
        f"{where}: {each}" for where, found in problems.items() for each in found
    )


def test_a_machine_without_a_browser_is_told_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install"), browser():
        pass
