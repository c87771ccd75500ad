"""Files of a model folder: whether there are weights, and digests, remembered in the cache."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.exchange.storage import atomic_write_text

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def has_weights(directory: Path) -> bool:
    """Whether a directory holds safetensors weights."""
    return any((directory / name).is_file() for name in _WEIGHTS)


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, remembered in the cache by (path, size, time of change)."""
    try:
        return _remembered(path).read_text()
    except OSError:
        return fresh_digest(path)


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read now and not remembered."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fresh_digest(path: Path) -> str:
    """SHA-256 (hex) of a file as it is now; :func:`file_digest` then remembers it."""
    value = hash_file(path)
    remember_digest(path, value)
    return value


def remember_digest(path: Path, value: str) -> None:
    """Let :func:`file_digest` answer ``value`` for this file until it changes."""
    with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
        atomic_write_text(_remembered(path), value)


def _remembered(path: Path) -> Path:
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    return cache_dir() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
