"""Files of a deployment folder: private ones are closed to others from their first byte on."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from heterotune_flwr.deploy.owners import closed, shut
from heterotune_flwr.errors import ConfigError

PRIVATE_FILE, PUBLIC_FILE, SCRIPT, FOLDER = 0o600, 0o644, 0o755, 0o700
#: What a file is called while it is written: the process is in its name, so that what a killed one left can be told.
_UNFINISHED = re.compile(r"\..+\.([0-9]{1,9})")


def make_folder(path: Path) -> Path:
    """Make a folder (and its parents) that only its owner enters; one that exists stays as it is.

    Raises ConfigError: it cannot be made.
    """
    try:
        path.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{path} is a file where a folder should be; move it away") from error
    except OSError as error:
        raise ConfigError(unwritten("folder", path, error)) from error
    return path


def own_folder(path: Path) -> Path:
    """Make a folder, or close one that is there, so that its owner alone enters it (ConfigError if that is another)."""
    make_folder(path)
    try:
        path.chmod(FOLDER)
    except OSError as error:
        raise ConfigError(unwritten("folder", path, error)) from error
    if shut(path):
        raise ConfigError(f"folder {path} cannot be used: {closed(path)}")
    return path


def write_private(path: Path, data: bytes) -> None:
    """Write a secret (mode 0600); never over one that is there.

    The complete file appears at once under its name: a crash leaves all of it or nothing.

    Raises ConfigError: the file exists, or cannot be written.
    """
    make_folder(path.parent)
    try:
        with _written_aside(path, data, PRIVATE_FILE) as temporary:
            os.link(temporary, path)  # unlike a rename, it refuses to replace
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and a secret is never overwritten; move it away first"
        ) from error
    except OSError as error:
        raise ConfigError(unwritten("the secret", path, error)) from error


def write_file(path: Path, data: str | bytes, mode: int = PUBLIC_FILE) -> None:
    """Write (or rewrite, atomically) a file that holds no secret; a file with equal contents is left alone."""
    raw = data.encode() if isinstance(data, str) else data
    make_folder(path.parent)
    try:
        if not (path.is_file() and path.read_bytes() == raw):
            with _written_aside(path, raw, mode) as temporary:
                os.replace(temporary, path)
        path.chmod(mode)
    except OSError as error:
        raise ConfigError(unwritten("file", path, error)) from error


def remove(path: Path) -> None:
    """Remove a file, if there is one (ConfigError)."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(unwritten("file", path, error)) from error


@contextmanager
def _written_aside(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of an earlier process with this one's number
    # The mode is the file's from its creation: there is no moment in which others may read a secret.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(folder: Path) -> list[Path]:
    """Files of a folder that processes were writing which have died since: copies of secrets among them.

    Raises ConfigError: the folder is closed.
    """
    writers = {
        path: found[1] for path in contents(folder) if (found := _UNFINISHED.fullmatch(path.name))
    }
    return [path for path, pid in writers.items() if not psutil.pid_exists(int(pid))]


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, nothing if there is none (ConfigError)."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(_unread("folder", folder, error)) from error


def present(path: Path, what: str) -> bool:
    """Whether a file is there (ConfigError where that cannot be seen because a folder is closed)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(_unread(what, path, error)) from error


def read_bytes(path: Path, what: str, mend: str) -> bytes:
    """Read a file of the deployment (ConfigError with ``mend`` when it cannot be, or with whose it is)."""
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise ConfigError(_unread(what, path, error)) from error
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read ({error.strerror or error}); {mend}"
        ) from error


def _unread(what: str, path: Path, error: OSError) -> str:
    return f"{what} {path} cannot be read: {_why(path, error)}"


def unwritten(what: str, path: Path, error: OSError) -> str:
    """Why something cannot be written, and how that is mended."""
    return f"{what} {path} cannot be written: {_why(path, error)}"


def _why(path: Path, error: OSError) -> str:
    # What only owners may do (chmod) is refused to others with EPERM; so is what a file system cannot do.
    foreign = error.errno == errno.EPERM and path.exists() and path.stat().st_uid != os.geteuid()
    return closed(path) if error.errno == errno.EACCES or foreign else error.strerror or str(error)


def open_to_others(path: Path) -> bool:
    """Whether anybody but the owner may read or write a file."""
    return bool(path.stat().st_mode & 0o077)
