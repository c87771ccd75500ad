"""Where a worker's socket and locks lie, and who may use them: only the user who owns them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from heterotune_flwr.errors import FederationError
from heterotune_flwr.program_version import code_hash

ENVIRONMENT = "HETEROTUNE_RUNTIME_DIR"
#: sun_path holds 108 bytes on Linux, 104 on macOS, one of them the closing zero.
PATH_LIMIT = 103
#: Settings that a worker takes from its environment; another value needs another worker.
_SETTINGS = ("HETEROTUNE_CACHE", "HETEROTUNE_ASSETS", "CUDA_VISIBLE_DEVICES", "HF_HOME")


class WorkerUnavailableError(FederationError):
    """No worker can be had here; the message may as well be answered in this process."""


def build_id() -> str:
    """Digest of what must be equal in a client and its worker: code, interpreter, settings."""
    parts = [
        code_hash(),
        sys.prefix,
        sys.version,
        *(os.environ.get(name, "") for name in _SETTINGS),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def runtime_dir() -> Path:
    """Owner-only folder of sockets and locks; made if it is not there.

    ``HETEROTUNE_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/heterotune``, else
    ``heterotune-<user id>`` in the system's temporary folder, whatever ``TMPDIR`` says.

    Raises WorkerUnavailableError: it cannot be made, or others may enter it.
    """
    given, session = os.environ.get(ENVIRONMENT), os.environ.get("XDG_RUNTIME_DIR")
    if given:
        folder = Path(given).expanduser().absolute()
    elif session and os.access(session, os.W_OK):
        folder = Path(session) / "heterotune"
    else:
        folder = Path("/tmp") / f"heterotune-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise WorkerUnavailableError(
            f"the folder {folder} for the worker's socket cannot be used ({error.strerror}); "
            f"set {ENVIRONMENT}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WorkerUnavailableError(
            f"{folder} is not a folder of this user; set {ENVIRONMENT} to another one"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise WorkerUnavailableError(
            f"others may enter {folder}, so it may hold no worker's socket: chmod 700 {folder}"
        )
    return folder


@dataclass(frozen=True)
class Place:
    """The files of the worker of one state directory."""

    state_dir: Path
    socket: Path

    @classmethod
    def of(cls, state_dir: str | Path) -> Place:
        """Return the place of a state directory (WorkerUnavailableError as :func:`runtime_dir`)."""
        absolute = Path(state_dir).expanduser().resolve()
        name = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
        path = runtime_dir() / f"{name}.sock"
        if len(os.fsencode(path)) > PATH_LIMIT:
            raise WorkerUnavailableError(
                f"the path {path} is too long for a socket; set {ENVIRONMENT} to a shorter folder"
            )
        return cls(absolute, path)

    @property
    def lock(self) -> Path:
        """Held by the worker for its life."""
        return self.socket.with_suffix(".lock")

    @property
    def start_lock(self) -> Path:
        """Held by whoever starts a worker."""
        return self.socket.with_suffix(".start")

    @property
    def log(self) -> Path:
        """The worker's log."""
        return self.state_dir / "worker.log"


class Lock:
    """An advisory lock on a file; the kernel lets go of it when its process ends, however it ends.

    The file itself is never removed: a process could then hold a lock on a file without a name.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._handle = os.open(path, flags, 0o600)

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; False when another process has it and ``wait`` is off."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go of the lock; it can be taken again."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the lock for good."""
        os.close(self._handle)


def check_peer(sock: socket.socket) -> int:
    """Return the process id at the other end, 0 where the system does not tell.

    Raises PermissionError: it belongs to another user.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return 0  # the folder's mode keeps others out
    layout = struct.Struct("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    pid, user, _ = layout.unpack(raw)
    if user != os.getuid():
        raise PermissionError(f"the process {pid} at the worker's socket belongs to user {user}")
    return int(pid)
