"""Which program runs here: what server and clients compare, and what a run's journal says of it."""

from __future__ import annotations

import functools
import hashlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from heterotune_flwr import __version__


@functools.cache
def code_hash() -> str:
    """SHA-256 (16 hex digits) over the package's Python files as this process runs them."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of this program and of what it computes with, by name; of what is not installed none."""
    found = {"heterotune-flwr": __version__, "python": platform.python_version()}
    for name in ("flwr", "torch", "transformers", "peft", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
