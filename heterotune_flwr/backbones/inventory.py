"""What backbones this machine has: listing, checking and clearing sources and the store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.fetch import source_damage
from heterotune_flwr.backbones.files import has_weights
from heterotune_flwr.backbones.manifest import MANIFEST, damage
from heterotune_flwr.backbones.sources import (
    EMBEDDED,
    FETCHABLE,
    describe_source,
    is_present,
    resolve_source,
)
from heterotune_flwr.backbones.store import bytes_in, entries, entry_facts, remove_entry
from heterotune_flwr.errors import BackboneError

_DAY = 86400.0


@dataclass(frozen=True)
class Entry:
    """An entry of the store as people see it; ``name`` is ``?`` when its manifest is damaged."""

    directory: Path
    name: str
    source: str
    type_key: str
    bits: str
    bytes: int
    unused_days: float


@dataclass(frozen=True)
class Checked:
    """A source or entry that was read whole, and what is wrong with it (None: nothing)."""

    what: str
    directory: Path
    trouble: str | None


def describe_known() -> Iterator[str]:
    """One line per backbone known by name: its shape, or how to get it."""
    for name in (*EMBEDDED, *FETCHABLE):
        if not is_present(name):
            how = f"heterotune backbones fetch {name}" if name in FETCHABLE else "not installed"
            yield f"{name:16} not here: {how}"
            continue
        try:
            shape = describe_source(name)
        except BackboneError as error:
            yield f"{name:16} damaged: {error}"
            continue
        yield f"{name:16} {shape.hidden} wide, {shape.layers} blocks, {shape.vocabulary} tokens"


def stored_entries() -> list[Entry]:
    """All entries of the store, by name and bits."""
    found = []
    for directory in entries():
        facts = entry_facts(directory)
        try:
            used = (directory / MANIFEST).stat().st_mtime
        except OSError:
            used = directory.stat().st_mtime
        found.append(
            Entry(
                directory=directory,
                name=str(facts.get("name", "?")),
                source=str(facts.get("source", "?")),
                type_key=str(facts.get("type_key", directory.name)),
                bits=str(facts.get("bits", directory.name.rpartition("-")[0])),
                bytes=bytes_in(directory),
                unused_days=max(0.0, time.time() - used) / _DAY,
            )
        )
    return sorted(found, key=lambda entry: (entry.name, entry.bits, entry.directory.name))


def verify() -> Iterator[Checked]:
    """Read every source and every entry of the store whole and compare checksums."""
    for name in EMBEDDED:
        if is_present(name):
            directory = resolve_source(name)
            yield Checked(name, directory, source_damage(directory))
    fetched = cache_dir() / "backbones"
    for directory in sorted(fetched.iterdir()) if fetched.is_dir() else ():
        if has_weights(directory) and not directory.name.startswith("."):
            yield Checked(directory.name, directory, source_damage(directory))
    for entry in stored_entries():
        yield Checked(f"store: {entry.type_key}", entry.directory, damage(entry.directory, "full"))


def prune(
    names: Sequence[str] = (), unused_days: float | None = None, damaged: bool = False
) -> list[Entry]:
    """Remove entries of the store and return them; every condition given must hold.

    ``names``: names, sources or type keys; none means all. ``unused_days``: only those no process loaded for so long.
    ``damaged``: only those whose checksums do not hold (reads them whole).

    Raises BackboneError: the store has no entry of a given name, or cannot be written.
    """
    candidates = stored_entries()
    for name in names:
        if not any(_is_called(entry, name) for entry in candidates):
            known = ", ".join(sorted({entry.name for entry in candidates})) or "nothing"
            raise BackboneError(f"the store has no entry of {name!r} (it has {known})")
    gone = []
    for entry in candidates:
        if names and not any(_is_called(entry, name) for name in names):
            continue
        if unused_days is not None and entry.unused_days < unused_days:
            continue
        if damaged and damage(entry.directory, "full") is None:
            continue
        remove_entry(entry.directory)
        gone.append(entry)
    return gone


def _is_called(entry: Entry, name: str) -> bool:
    return name in (entry.name, entry.source, entry.type_key, entry.directory.name)
