"""Every test of this room begins without kept states and ends without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_backbones import save_backbone

from heterotune_flwr.tuning.adapters import detach_all
from heterotune_flwr.tuning.state_cache import forget_states


@pytest.fixture(autouse=True)
def _own_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    forget_states()
    yield
    detach_all()


@pytest.fixture(scope="session")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone of four blocks."""
    return save_backbone(tmp_path_factory.mktemp("four") / "blocks", layers=4)
