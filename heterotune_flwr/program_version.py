"""Which program runs here: what server and clients compare."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def code_hash() -> str:
    """SHA-256 (16 hex digits) over the package's Python files as this process runs them."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
