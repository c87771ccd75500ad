"""Files of a deployment folder: private ones are closed to others from their first byte on."""

from __future__ import annotations

import os
from pathlib import Path

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import atomic_write_bytes

PRIVATE_FILE, PUBLIC_FILE, SCRIPT, FOLDER = 0o600, 0o644, 0o755, 0o700


def make_folder(path: Path) -> Path:
    """Make a folder (and its parents) that only its owner enters; one that exists stays as it is.

    Raises
    ------
    ConfigError
        It cannot be made.

    """
    try:
        path.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {path} cannot be made: {error.strerror or error}") from error
    return path


def write_private(path: Path, data: bytes) -> None:
    """Write a secret (mode 0600); never over one that is there.

    The complete file appears at once under its name: a crash leaves all of it or nothing.

    Raises
    ------
    ConfigError
        The file exists, or cannot be written.

    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # The mode is the file's from its creation: there is no moment in which others may read it.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temporary, path)  # unlike a rename, it refuses to replace
        finally:
            temporary.unlink()
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and a secret is never overwritten; move it away first"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, data: str | bytes, mode: int = PUBLIC_FILE) -> None:
    """Write (or rewrite, atomically) a file that holds no secret; a file with equal contents is left alone."""
    raw = data.encode() if isinstance(data, str) else data
    try:
        if not (path.is_file() and path.read_bytes() == raw):
            atomic_write_bytes(path, raw)
        path.chmod(mode)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def read_bytes(path: Path, what: str, mend: str) -> bytes:
    """Read a file of the deployment (ConfigError with ``mend`` when it cannot be)."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read ({error.strerror or error}); {mend}"
        ) from error


def open_to_others(path: Path) -> bool:
    """Whether anybody but the owner may read or write a file."""
    return bool(path.stat().st_mode & 0o077)
