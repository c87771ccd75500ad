"""Files that are either the old or the new version, never half of one (write, fsync, rename)."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from heterotune_flwr.errors import ExchangeError

#: Of folders that only their owner enters.
_OWNER = 0o700


def private_folder(path: Path) -> None:
    """Make a folder, and missing parents, for its owner alone whatever the umask; one that is there stays.

    ``Path.mkdir`` gives its mode to the last folder only.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        try:
            folder.mkdir(_OWNER)
            folder.chmod(_OWNER)
        except FileExistsError:  # there, or another process was faster
            if not folder.is_dir():
                raise


def close_to_others(path: Path) -> None:
    """Take from others, and the group, what they may do with a file or folder of ours.

    What is another user's, and a folder that all may write to (``/tmp``), stays as it is.
    """
    with contextlib.suppress(OSError):
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid == os.geteuid() and mode & 0o077 and not mode & stat.S_ISVTX:
            path.chmod(mode & ~0o077)


def atomic_write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace ``path`` by ``data``; parents are made; readers never see a partial file.

    Without ``durable`` the disk is not waited for: after a crash the file may be gone, and after one of the machine
    torn, so its reader must be able to tell (a digest).
    """
    private_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        if not durable:
            # ext4 writes the data out when a rename replaces a file: 4 ms that nobody waits for.
            path.unlink(missing_ok=True)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` by UTF-8 ``text``, atomically."""
    atomic_write_bytes(path, text.encode())


def save_tensors(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
    durable: bool = True,
) -> None:
    """Save named arrays as safetensors, atomically (``durable``: see :func:`atomic_write_bytes`).

    Equal tensors and metadata give equal files.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    data = save(arrays, metadata=dict(metadata or {}))
    atomic_write_bytes(path, _ordered(data) if len(metadata or {}) > 1 else data, durable)


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata by name: the library writes them in an order of chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Load a safetensors file (ExchangeError: the file is missing or not a complete safetensors file)."""
    try:
        loaded: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, RecursionError) as error:
        raise ExchangeError(f"{path} cannot be read as safetensors: {error}") from error
    return loaded
