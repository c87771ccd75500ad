"""Connect to the worker of a state directory; start it where there is none."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import heterotune_flwr
from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.storage import close_to_others, private_folder
from heterotune_flwr.worker.places import Lock, Place, WorkerUnavailableError

IDLE_SECONDS = 1800.0
#: How long a new worker may take until it listens (it imports torch after that).
START_SECONDS = 60.0
#: How long to wait for an outgoing worker that finishes its last job.
FINISH_SECONDS = 600.0
LOG_BYTES = 2**20
_POLL = 0.05


class WorkerBusyError(FederationError):
    """An outgoing worker still holds the state directory."""


def connect(place: Place) -> socket.socket | None:
    """Connect to the worker's socket; None when nobody listens.

    Raises WorkerUnavailableError: what lies at the socket's path is not this user's socket.
    """
    try:
        found = place.socket.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        raise WorkerUnavailableError(f"{place.socket} is not a socket of this user; remove it")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(START_SECONDS)
        sock.connect(os.fspath(place.socket))
    except (ConnectionError, FileNotFoundError):  # left over by a worker that was killed
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise WorkerUnavailableError(f"{place.socket} cannot be used: {error}") from error
    return sock


def ensure(place: Place, idle_seconds: float = IDLE_SECONDS) -> socket.socket:
    """Connect to the worker of a place; start it first where there is none.

    Raises WorkerUnavailableError: it cannot be started; WorkerBusyError: the worker before it does not come to an end.
    """
    sock = connect(place)
    if sock is not None:
        return sock
    with _only_starter(place):
        sock = connect(place)  # another message was faster
        if sock is not None:
            return sock
        _await_end_of_predecessor(place)
        process = _spawn(place, idle_seconds)
        deadline = time.monotonic() + START_SECONDS
        while (sock := connect(place)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise WorkerUnavailableError(f"the worker did not start; see {place.log}")
            time.sleep(_POLL)
        return sock


def await_free(path: Path, seconds: float) -> bool:
    """Wait until nobody holds the lock at ``path``; False after ``seconds``."""
    lock, deadline = Lock(path), time.monotonic() + seconds
    try:
        while not lock.acquire():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True
    finally:
        lock.close()


@contextmanager
def _only_starter(place: Place) -> Iterator[None]:
    """Two messages that come at once start one worker, not two."""
    try:
        lock = Lock(place.start_lock)
    except OSError as error:
        raise WorkerUnavailableError(
            f"{place.start_lock} cannot be written: {error.strerror}"
        ) from error
    try:
        lock.acquire(wait=True)
        yield
    finally:
        lock.close()


def _await_end_of_predecessor(place: Place) -> None:
    if not await_free(place.lock, FINISH_SECONDS):
        raise WorkerBusyError(
            f"the old worker of {place.state_dir} has not finished its job after "
            f"{FINISH_SECONDS:.0f} s; end it with: heterotune worker stop --now --state-dir "
            f"{place.state_dir}"
        )


def worker_environment() -> dict[str, str]:
    """Environment of this process, in which Python finds this very code, wherever it lies."""
    root = str(Path(heterotune_flwr.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "")
    paths = [str(Path(entry).absolute()) for entry in known.split(os.pathsep) if entry]
    search = os.pathsep.join(dict.fromkeys([root, *paths]))
    return {**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}


def _spawn(place: Place, idle_seconds: float) -> subprocess.Popen[bytes]:
    """Start a worker that belongs to no terminal and holds no pipe of this process."""
    try:
        private_folder(place.state_dir)
        close_to_others(place.state_dir)
        with suppress(FileNotFoundError):
            if place.log.stat().st_size > LOG_BYTES:
                os.replace(place.log, place.log.with_suffix(".log.1"))
        handle = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "ab") as log:
            return _popen(place, idle_seconds, log)
    except OSError as error:
        raise WorkerUnavailableError(f"the worker cannot be started: {error}") from error


def _popen(place: Place, idle_seconds: float, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable, "-P", "-m", "heterotune_flwr.worker",
            "--state-dir", str(place.state_dir), "--idle-seconds", str(idle_seconds),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=worker_environment(),
        start_new_session=True,
    )  # fmt: skip
