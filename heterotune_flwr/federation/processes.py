"""Every process of one run, found by a mark in its environment and ended for certain.

A parent's list of children is not enough: when a process in the middle dies, its children (Ray's
raylet, workers) belong to nobody. The mark is inherited by all of them. Run as a script, this file
is the guard of a run: it waits for the end of its standard input, a pipe whose other end only the
launcher holds, and then ends the run. So nothing is left even when the launcher is killed (SIGKILL).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

#: Environment variable that names the run a process belongs to.
MARK = "HETEROTUNE_RUN"
GRACE_SECONDS = 5.0


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return this user's processes that carry ``mark``, and their descendants; never the caller."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                # Ray's workers overwrite their environment with their title: take them as children.
                for member in (process, *process.children(recursive=True)):
                    found[member.pid] = member
    found.pop(psutil.Process().pid, None)
    return list(found.values())


def end_marked(mark: str, grace: float = GRACE_SECONDS) -> None:
    """End all processes of a run: ask, insist after ``grace`` seconds, look again until none is left."""
    deadline = time.monotonic() + grace
    known: set[psutil.Process] = set()  # a worker may lose its mark and its parent, but not its pid
    while processes := _alive(known := known | set(marked_processes(mark))):
        insist = time.monotonic() >= deadline
        for process in processes:
            with suppress(psutil.Error):
                process.kill() if insist else process.terminate()
        psutil.wait_procs(processes, timeout=max(0.5, deadline - time.monotonic()))
        if time.monotonic() > deadline + 3 * grace:  # unkillable (uninterruptible I/O)
            return


def _alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def start_guard(mark: str, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start the guard of run ``mark``; close its ``stdin`` to let it clean up and end.

    ``folders`` are removed once the run's processes are gone.
    """
    return subprocess.Popen(
        [sys.executable, "-P", __file__, mark, *map(str, folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def clean_up(mark: str, folders: Sequence[Path]) -> None:
    """End a run's processes, then remove its working folders."""
    end_marked(mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def on_signals(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, *names: str
) -> Iterator[None]:
    """Handle these signals so for a while; only a main thread can, another one changes nothing."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupt(number: int, _frame: FrameType | None) -> None:
    """SIGTERM and a closed terminal end the run like Ctrl-C does, through the clean-up: a handler."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _guard() -> None:
    mark, *folders = sys.argv[1:]
    while sys.stdin.buffer.read(1):
        pass
    clean_up(mark, [Path(folder) for folder in folders])


if __name__ == "__main__":
    _guard()
