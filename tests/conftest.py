"""A cache of its own for the test session, and no processes that outlive it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same arithmetic on every machine. HETEROTUNE_TESTS_ON=gpu runs them on the first GPU.
if os.environ.get("HETEROTUNE_TESTS_ON", "cpu") != "gpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# How long an example takes says how busy the machine is, nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _no_worker() -> Iterator[None]:
    """Deployed clients answer in the process at hand; the worker's own tests switch it on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETEROTUNE_WORKER", "off")
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Point ``HETEROTUNE_CACHE`` (inherited by every child process) at a temporary directory."""
    before = os.environ.get("HETEROTUNE_CACHE")
    with tempfile.TemporaryDirectory(prefix="heterotune-cache-") as folder:
        os.environ["HETEROTUNE_CACHE"] = folder
        yield
    if before is None:
        del os.environ["HETEROTUNE_CACHE"]
    else:
        os.environ["HETEROTUNE_CACHE"] = before
