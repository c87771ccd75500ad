"""The files of a run directory as they are: whatever of them is missing or damaged is said, and passed over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from heterotune_flwr.config.plain import load_plain
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import parse_event
from heterotune_flwr.jsons import as_list, as_mapping, as_whole, parse_json

Event = Mapping[str, Any]
Key = tuple[str, int]


@dataclass
class RunFiles:
    """What was read of a run directory.

    ``events`` are those of the journal in order, ``undone`` the places in it whose rounds a resumed run did again.
    ``results``: (strategy, seed) -> its entry in results.json. ``damaged`` counts the journal's unreadable lines.
    """

    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    results: dict[Key, Mapping[str, Any]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    undone: set[int] = field(default_factory=set)
    status: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    trouble: list[str] = field(default_factory=list)
    damaged: int = 0

    def of(self, *kinds: str, key: Key | None = None, undone: bool = False) -> list[Event]:
        """Events of some kinds, in order, of one strategy and seed or all; those done again only when ``undone``."""
        places = sorted(place for kind in kinds for place in self._places.get(kind, ()))
        found = [self.events[place] for place in places if undone or place not in self.undone]
        return found if key is None else [event for event in found if key_of(event) == key]

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """Kind of event -> where those are: runs have up to a million, and are asked for few."""
        found: dict[str, list[int]] = {}
        for place, event in enumerate(self.events):
            found.setdefault(event["event"], []).append(place)
        return found

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration."""
        return as_mapping(self.config.get(name))


def key_of(event: Event) -> Key | None:
    """Strategy and seed of an event; None where it is of the whole run."""
    strategy = event.get("strategy")
    return (str(strategy), as_whole(event.get("seed"))) if strategy else None


def read_files(directory: Path) -> RunFiles:
    """Read a run directory (ConfigError: it is none, or cannot be read)."""
    directory = directory.expanduser().absolute()
    journal, results = directory / "rounds.jsonl", directory / "results.json"
    if not journal.is_file() and not results.is_file():
        raise ConfigError(
            f"{directory} is no run directory: it has neither rounds.jsonl nor results.json; heterotune runs lists "
            "those there are"
        )
    found = RunFiles(directory)
    _read_journal(found, journal)
    _read_results(found, results)
    if found.damaged and not found.events and not found.results:
        raise ConfigError(f"{journal} is no journal: none of its lines is an event of a run")
    found.status = as_mapping(_json(found, directory / "status.json", "how the run ended"))
    found.name = str(as_mapping(_json(found, directory / "run.json", "")).get("name") or "")
    settings = directory / "config.yaml"
    if not found.config or (settings.exists() and _ahead(found.events)):
        found.config = _config(found, settings) or found.config
    found.undone = _undone(found.events)
    return found


def _read_journal(found: RunFiles, path: Path) -> None:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        found.trouble.append("rounds.jsonl is missing: nothing is known of what happened in rounds")
        return
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}; ask as the user whose run it is"
        ) from error
    for line in filter(None, lines):
        event = parse_event(line)
        if event is None:
            found.damaged += 1
        else:
            found.events.append(event)
    if found.damaged:
        found.trouble.append(
            "one line of rounds.jsonl could not be read, and was passed over"
            if found.damaged == 1
            else f"{found.damaged} lines of rounds.jsonl could not be read, and were passed over"
        )


def _read_results(found: RunFiles, path: Path) -> None:
    if not path.exists():
        ended = any(event["event"] == "strategy_end" for event in found.events)
        found.trouble.append(
            "results.json is missing: numbers are those of the journal"
            if ended
            else "no strategy has finished yet: numbers are those of the journal"
        )
        return
    results = as_mapping(_json(found, path, "numbers are those of the journal"))
    found.config = as_mapping(results.get("config"))
    for run in as_list(results.get("runs")):
        if isinstance(run, Mapping) and "strategy" in run:
            found.results[str(run["strategy"]), as_whole(run.get("seed"))] = run


def _json(found: RunFiles, path: Path, without: str) -> Any:
    """A file's JSON; None where it is missing (which is said where it matters) or damaged (which is always said)."""
    try:
        return parse_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        tail = f": {without}" if without else ""
        found.trouble.append(f"{path.name} cannot be read ({error}){tail}")
        return None


def _config(found: RunFiles, path: Path) -> Mapping[str, Any]:
    try:
        return as_mapping(load_plain(path.read_text(), str(path)))
    except FileNotFoundError:
        found.trouble.append("config.yaml is missing: the settings are not known")
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        found.trouble.append(f"config.yaml cannot be read ({error}): the settings are not known")
    return {}


def _ahead(events: list[Event]) -> bool:
    """Whether the last start has finished no strategy yet: results.json then has an earlier one's settings."""
    kinds = [event["event"] for event in events if event["event"] in ("journal", "strategy_end")]
    return kinds[-1:] == ["journal"]


def _undone(events: list[Event]) -> set[int]:
    """Places of events about rounds that a later start of the run did again.

    A strategy that starts once more begins anew, or, where ``resumed`` follows, after that event's round. What the
    same start of the run has told of it before, such as a channel that is off, stays.
    """
    opened = 0
    gone: set[int] = set()
    seen: dict[Key, list[int]] = {}
    again: dict[Key, list[int]] = {}
    for place, event in enumerate(events):
        opened = place if event["event"] == "journal" else opened
        key = key_of(event)
        if key is None:
            continue
        if event["event"] == "start":
            again[key] = [p for p in seen.get(key, []) if p not in gone and p < opened]
            gone |= set(again[key])
        elif event["event"] == "resumed":
            done = as_whole(event.get("round"))
            gone -= {p for p in again.pop(key, []) if as_whole(events[p].get("round")) <= done}
        seen.setdefault(key, []).append(place)
    return gone


def size_of(directory: Path) -> int:
    """Bytes of a folder's files; what cannot be seen counts nothing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total
