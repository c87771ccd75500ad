"""Every test of this room begins with an empty cache and leaves no backbone in the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from heterotune_flwr.backbones.bits import chosen_bits
from heterotune_flwr.backbones.loading import clear_backbones
from heterotune_flwr.tuning.adapters import detach_all


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache's folder, not made yet."""
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    chosen_bits.cache_clear()
    clear_backbones()
    yield tmp_path / "cache"
    detach_all()
    clear_backbones()
