"""What a directory of the cache should contain: ``manifest.json`` with sizes and checksums."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from heterotune_flwr.backbones.files import file_digest, fresh_digest, hash_file, remember_digest
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.jsons import parse_json

MANIFEST = "manifest.json"

Checks = Literal["sizes", "remembered", "full"]


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Describe every file of ``directory`` (OSError if it cannot be written)."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True) + "\n"
    atomic_write_text(directory / MANIFEST, text)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory, None where it has none or an unreadable one."""
    try:
        manifest = parse_json((directory / MANIFEST).read_text())
        sizes = [int(entry["bytes"]) for entry in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if sizes else None


def flush_to_disk(directory: Path) -> None:
    """Make the files of a directory, and their names, survive a power cut."""
    for path in (*directory.iterdir(), directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_directory(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A new folder to fill; at the end it takes the place of ``target``, with a manifest, or nothing has changed.

    What another process has mapped of an older ``target`` it keeps.
    """
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        write_manifest(temporary, facts)
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.chmod(0o755)
        flush_to_disk(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        flush_to_disk(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remember_checksums(directory: Path) -> None:
    """Spare the first load of a directory that was moved here a second reading."""
    manifest = read_manifest(directory) or {"files": {}}
    for name, entry in manifest["files"].items():
        remember_digest(directory / name, entry["sha256"])


def damage(directory: Path, checks: Checks = "remembered") -> str | None:
    """Say what contradicts the manifest of ``directory``; None if nothing does.

    ``checks``: ``sizes`` only, checksums ``remembered`` since the file last changed, or ``full`` ones.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if checks == "sizes":
                continue
            digest = file_digest(path) if checks == "remembered" else fresh_digest(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if digest != expected.get("sha256"):
            return f"{name} has another checksum than when it was written"
    return None
