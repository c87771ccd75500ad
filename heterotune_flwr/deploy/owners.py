"""Whose a file is that this user may not use, and how that is mended."""

from __future__ import annotations

import os
import pwd
from pathlib import Path


def user_name(number: int | None = None) -> str:
    """Name of a user (None: of this process); its number where it has no name."""
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def shut(path: Path) -> bool:
    """Whether a folder that is there cannot be listed, entered or written by this process."""
    wanted = os.R_OK | os.W_OK | os.X_OK
    return not os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids)


def closed(path: Path) -> str:
    """Why this user was refused a path, and the command that mends it."""
    blocker = _blocker(path)
    me, number = user_name(), blocker.stat().st_uid
    if number == os.geteuid():
        return f"{blocker} is closed even to its owner {me}; run: chmod u+rwX {blocker}"
    return (
        f"{blocker} belongs to {user_name(number)}, this is run by {me}; the folder must belong to who runs it: as "
        f"root, chown -R {me} {blocker if blocker.is_dir() else blocker.parent} (or run this as {user_name(number)})"
    )


def _blocker(path: Path) -> Path:
    """The outermost folder of a path that cannot be entered; the path itself, or what is left of it, otherwise."""
    effective = os.access in os.supports_effective_ids
    there = path
    for folder in reversed(path.absolute().parents):
        if not os.access(folder, os.X_OK, effective_ids=effective):
            return folder
    while not there.exists():
        there = there.parent
    return there
