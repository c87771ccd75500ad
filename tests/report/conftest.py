"""One recorded run for all tests of this room: reading it changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from questions import Facts
from recorded import record

from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.read import read_facts


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session")
def facts(directory: Path) -> RunFacts:
    return read_facts(directory)


@pytest.fixture(scope="session")
def told(facts: RunFacts) -> Facts:
    """As ``report --json`` gives it."""
    found: Facts = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    return found


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return shutil.copytree(directory, tmp_path / "copy")
