"""The way of a newcomer: the README's commands, from a clone to a chat."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.deployment import newcomer

ROOT = Path(__file__).parents[2]


def test_the_readme_leads_from_the_set_up_to_a_chat():
    found = newcomer.commands((ROOT / "README.md").read_text())
    assert found[0] == newcomer.SETUP
    steps = [line.partition("heterotune ")[2].split()[0] for line in found[1:]]
    assert steps == ["new", "data", "run", "export", "evaluate", "chat"]


def test_the_data_are_such_as_the_readme_names(tmp_path):
    newcomer.write_reviews(tmp_path / "reviews.csv")
    with (tmp_path / "reviews.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["review"] for row in rows}) == len(rows) == 320
    assert {len({row[name] for row in rows}) for name in ("mood", "shop")} == {3, 4}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("git") is None, reason="the walk begins with a clone")
def test_a_newcomer_gets_from_a_clone_to_a_chat(tmp_path):
    seconds = newcomer.walk(tmp_path, Path(sys.prefix))
    assert "heterotune chat" in list(seconds)[-1]
