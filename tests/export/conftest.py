"""A process without this package, for all modules of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fresh import Fresh


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """A process that has the large libraries alone."""
    with Fresh(tmp_path_factory.mktemp("elsewhere")) as process:
        yield process
