"""Where frozen states are kept: in memory under a budget, on disk under another.

``<folder>/<2 hex>/<key>.safetensors``, one table per list of examples, memory-mapped when read. They are derived from a
client's private examples, so they stay on its machine, readable by their owner only: a deployed node's in ``states`` of
its ``state-dir``, a simulation's in that of the cache. The least recently used files go first when the disk budget is
passed, and those that nobody has used for :data:`OLDEST_DAYS`; ``heterotune states --clear`` removes all.

Budgets (GB = 10^9 bytes): ``HETEROTUNE_STATES_GB`` on disk (20), ``HETEROTUNE_STATES_MEMORY_GB`` per process (0.5).
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import atomic_write_bytes, private_folder

log = logging.getLogger(__name__)

#: Days after its last use that a table is kept.
OLDEST_DAYS = 30.0


def _budget(name: str, default: float) -> int:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise ConfigError(f"{name} is {text!r}; give a number of GB, like {name}={default}")
    return int(value * 1e9)


def memory_budget() -> int:
    """Bytes of states a process keeps in memory (ConfigError: not a number)."""
    return _budget("HETEROTUNE_STATES_MEMORY_GB", 0.5)


def disk_budget() -> int:
    """Bytes of states kept on disk (ConfigError: not a number)."""
    return _budget("HETEROTUNE_STATES_GB", 20.0)


class Memory:
    """Tables by key, the least recently used ones forgotten first."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> Tensor | None:
        """The table of a key, None when it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: str, table: Tensor) -> None:
        """Hold a table, unless it is larger than the whole budget."""
        limit = memory_budget()
        if table.nbytes > limit:
            return  # read from disk piece by piece, or computed again
        before = self._held.pop(key, None)
        self._held[key] = table
        self._bytes += table.nbytes - (0 if before is None else before.nbytes)
        while self._bytes > limit:
            self._bytes -= self._held.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self._bytes = 0


class Written:
    """Prunes the disk after enough was written: to look through thousands of files after every table is quadratic.

    A process may thus pass the budget by 1/64 of it.
    """

    def __init__(self) -> None:
        self._since: int | None = None

    def add(self, count: int, path: Path) -> None:
        """Take down a file of so many bytes."""
        limit = disk_budget()
        self._since = None if self._since is None else self._since + count
        if self._since is None or 64 * self._since >= limit:
            prune(limit, keep=path)
            self._since = 0


#: Explicit per-process count.
written = Written()
#: Explicit per-process cache; holds frozen states only, nothing a client trained.
memory = Memory()


#: The state directory whose client this process works for; None in a simulation.
_state_dir: Path | None = None
pruned: set[Path] = set()


def states_dir(state_dir: Path | None = None) -> Path:
    """Folder of kept states: a state directory's, else that of the client at work, else the cache's."""
    return (state_dir or _state_dir or cache_dir()) / "states"


def keep_in(state_dir: Path | None) -> None:
    """Say whose states this process keeps from now on: those of a deployed node, or (None) of a simulation.

    What nobody uses any more goes when a process first comes to a folder.
    """
    global _state_dir
    _state_dir = state_dir
    if states_dir() not in pruned:
        pruned.add(states_dir())
        prune(disk_budget())


def states_path(key: str) -> Path:
    """File of kept states on disk."""
    return states_dir() / key[:2] / f"{key}.safetensors"


def _from_disk(path: Path, rows: int, hidden: int) -> Tensor | None:
    """A table ``rows x hidden``, memory-mapped; None when it is not there, not whole or not this."""
    try:
        table: Tensor = load_file(path)["states"]
        os.utime(path)
    except (OSError, SafetensorError, KeyError):
        return None
    return table if tuple(table.shape) == (rows, hidden) else None


def kept(
    key: str,
    rows: int,
    hidden: int,
    device: torch.device,
    compute: Callable[[], Tensor],
    on_disk: bool = True,
) -> Tensor:
    """The table ``rows x hidden`` of a key from memory, from disk, or computed now and kept.

    It lies on ``device``, or in main memory when it is larger than the memory budget. Safe under concurrent workers:
    one computes while the others wait for its file, which appears whole or not at all. A disk that cannot be
    written costs time only.
    """
    held = memory.get(key)
    if held is not None:
        return held
    table = _from_disk(states_path(key), rows, hidden) if on_disk else None
    if table is None:
        table = _computed(key, rows, hidden, compute) if on_disk else compute()
    if table.nbytes <= memory_budget():
        table = table.to(device)
    memory.put(key, table)
    return table


def _computed(key: str, rows: int, hidden: int, compute: Callable[[], Tensor]) -> Tensor:
    path = states_path(key)
    table: Tensor | None = None
    try:
        private_folder(path.parent)
        with FileLock(path.with_suffix(".lock"), mode=0o600):
            table = _from_disk(path, rows, hidden)
            if table is None:
                table = compute()
                if table.nbytes <= disk_budget():
                    atomic_write_bytes(path, save({"states": table.cpu().contiguous()}))
                    written.add(table.nbytes, path)
                    # Mapped pages can be dropped and shared; computed ones cannot.
                    table = _from_disk(path, rows, hidden)
    except OSError as error:
        log.warning("states are not kept on disk: %s", error)
    return compute() if table is None else table


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of last use) of every kept table."""
    found = []
    for path in folder.glob("*/*.safetensors"):
        try:
            stat = path.stat()
        except OSError:
            continue  # another process has removed it
        found.append((path, stat.st_size, stat.st_mtime))
    return found


def usage(folder: Path | None = None) -> tuple[int, int]:
    """(number of kept tables on disk, their bytes); ``folder``: :func:`states_dir`."""
    files = _files(folder or states_dir())
    return len(files), sum(size for _, size, _ in files)


def prune(limit: int = 0, keep: Path | None = None, folder: Path | None = None) -> int:
    """Remove tables of :data:`OLDEST_DAYS`, and the least recently used ones until at most ``limit`` bytes are left.

    ``keep`` is never removed; ``folder``: :func:`states_dir`. A table in use stays readable for who has it open.
    Returns the bytes removed.
    """
    files = sorted(_files(folder or states_dir()), key=lambda item: item[2])
    total, removed = sum(size for _, size, _ in files), 0
    for path, size, used in files:
        if total - removed <= limit and used > time.time() - OLDEST_DAYS * 86400:
            break
        if path == keep:
            continue
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
        removed += size
    return removed


def forget_states() -> None:
    """Empty the memory cache; the disk cache stays."""
    memory.clear()
