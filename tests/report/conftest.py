"""One recorded run for all tests of this room: reading it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import record

from heterotune_flwr.report.facts import RunFacts
from heterotune_flwr.report.read import read_facts


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session")
def facts(directory: Path) -> RunFacts:
    return read_facts(directory)
