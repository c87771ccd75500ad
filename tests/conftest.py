"""A cache of its own for the test session; what a module leaves in the process is gone after it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same arithmetic on every machine. HETEROTUNE_TESTS_ON=gpu runs them on the first GPU.
if os.environ.get("HETEROTUNE_TESTS_ON", "cpu") != "gpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# One thread per process: the models are tiny, and the suite runs on every core anyway (before torch is imported).
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Backbones, adapters and states of a module's tests are forgotten, where it loaded any."""
    yield
    loaded = sys.modules
    if "heterotune_flwr.tuning.state_cache" in loaded:
        state_cache = loaded["heterotune_flwr.tuning.state_cache"]
        state_cache.keep_in(None)
        state_cache.forget_states()
    if "heterotune_flwr.tuning.adapters" in loaded:
        loaded["heterotune_flwr.tuning.adapters"].detach_all()
    if "heterotune_flwr.backbones.loading" in loaded:
        loaded["heterotune_flwr.backbones.loading"].clear_backbones()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny backbones, ``one`` and ``two``, training and test rows, and anchors."""
    from tiny_backbones import save_backbone, write_rows

    folder = tmp_path_factory.mktemp("federation")
    save_backbone(folder / "one", hidden=32)
    save_backbone(folder / "two", hidden=48, seed=1)
    write_rows(folder / "train.jsonl", 240)
    write_rows(folder / "test.jsonl", 30, offset=1000)
    (folder / "anchors.txt").write_text("".join(f"public text number {n}\n" for n in range(40)))
    return folder


@pytest.fixture
def world(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four simulated clients of two types, with an empty cache (:class:`real_clients.World`)."""
    from real_clients import new_world

    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    return new_world(folder, tmp_path)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone of three blocks."""
    from tiny_backbones import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbones") / "little")


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """24 rows of one's own as a :class:`DataConfig`."""
    from tiny_backbones import write_rows

    from heterotune_flwr.schema import DataConfig

    train = str(write_rows(tmp_path / "train.jsonl", 24))
    return DataConfig(name="own", train=train, prompt="Package: {text}\nSection:")


@pytest.fixture
def adapted(directory: Path, data: Any) -> Any:
    """A model with random values in its bank and cores, its task, and some examples."""
    from tiny_adapters import adapted_task

    return adapted_task(directory, data)


@pytest.fixture
def heterotune(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """The command in this process: exit code, and what it prints; ``said`` on standard input, None: that is closed."""

    def call(*arguments: object, said: str | None = "") -> subprocess.CompletedProcess[str]:
        from heterotune_flwr.entry import main

        words = [str(word) for word in arguments]
        monkeypatch.setattr(sys, "argv", ["heterotune", *words])
        monkeypatch.setattr(sys, "stdin", None if said is None else io.StringIO(said))
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call
