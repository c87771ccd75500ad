"""The run directory: what happened, written while it happens, readable after a crash.

=========================  =====================================================================
``config.yaml``            the resolved configuration
``run.json``               the name clients keep their state under
``status.json``            ``{"state": "running" | "finished" | "failed", "reason": ...}``
``rounds.jsonl``           the journal: one event per line (docs/journal.md), read by the command line while it grows
``results.json``           rewritten after every strategy, so nothing computed is lost
``banks/*.safetensors``    final shared tensors of every strategy and seed
``checkpoints/``, ``maps/``  what ``heterotune run --resume`` needs (:mod:`.checkpoint`)
=========================  =====================================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import FederationError
from heterotune_flwr.exchange.storage import (
    atomic_write_text,
    close_to_others,
    private_folder,
    save_tensors,
)
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.names import safe_text

log = logging.getLogger(__name__)

#: Of the events' fields (docs/journal.md); raised when a reader of the older ones would misread a new one.
VERSION = 2
#: Events that a power cut may take: they are many, and nothing is rebuilt from them.
_PASSING = frozenset({"train_reply", "bytes", "progress", "asked"})
#: Seconds between two events that tell how far asking or testing is.
_PACE = 2.0
#: Letters of an event's ``reason``.
LONGEST_REASON = 2000


def to_json(value: Any) -> Any:
    """Turn numpy numbers into plain ones and numbers JSON cannot say into null, recursively."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line (FederationError)."""
    try:
        yield
    except OSError as error:
        raise FederationError(
            f"{path} cannot be written: {error.strerror or error}; make room (or the folder writable), then go on "
            f"with heterotune run --resume {shlex.quote(str(path.parent))}"
        ) from error


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a journal, in order; what a crash left of a line is passed over."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        event = parse_event(line)
        if event is not None:
            found.append(event)
    return found


def parse_event(line: bytes) -> dict[str, Any] | None:
    """One line of a journal, None for one that is empty, torn, or no event."""
    try:
        event = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def client_of(event: Mapping[str, Any]) -> str | None:
    """The client that an event names; of one left out before it said who it is, its node; None where there is none."""
    client_id = event.get("client_id")
    if event["event"] == "left_out" and not client_id:
        return f"node {event.get('node_id')}"
    return None if client_id is None else str(client_id)


class EventReader:
    """Reads a journal's new events, complete lines only; those there already are passed over, unless ``from_start``."""

    def __init__(self, path: Path, from_start: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() and not from_start else 0

    def new(self) -> list[dict[str, Any]]:
        """Events written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        events = map(parse_event, data[:complete].split(b"\n"))
        return [event for event in events if event is not None]


class _Journals(Protocol):
    """Anything that writes events: a journal, or who adds fields of its own on the way there."""

    def event(self, event: str, /, **fields: Any) -> None:
        """Write one."""


class Pace:
    """Tells now and then how far a long exchange of messages is; what is over within seconds tells nothing.

    ``what`` is ``connecting``, ``asking``, ``aligning`` or ``testing``; ``fields`` are the event's besides.
    """

    def __init__(self, to: _Journals, what: str, **fields: Any) -> None:
        self._to, self._fields = to, {"what": what, **fields}
        self._last, self._told = time.monotonic(), -1

    def __call__(self, done: int, of: int) -> None:
        """Take down that ``done`` of ``of`` clients are there, have answered or were given up."""
        now = time.monotonic()
        if done < of and done != self._told and now - self._last >= _PACE:
            self._last, self._told = now, done
            self._to.event("progress", done=done, clients=of, **self._fields)


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner may read, from its first byte on."""
    return os.open(path, flags, 0o600)


def append_event(path: Path, event: str, /, **fields: Any) -> dict[str, Any]:
    """Append one event to a journal and return it; the line is complete on disk by then."""
    if isinstance(reason := fields.get("reason"), str):  # it may quote what a client sent
        fields["reason"] = safe_text(reason, LONGEST_REASON)
    record: dict[str, Any] = to_json({"event": event, "time": time.time(), **fields})
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with writing(path), open(path, "ab", buffering=0, opener=_private) as stream:
        # One write: a reader, or a crash, never sees two halves of different lines.
        if stream.write(line) != len(line):
            raise OSError("only part of an event could be written")
        if event not in _PASSING:
            os.fsync(stream.fileno())
    return record


def close_torn_line(path: Path) -> bool:
    """End a last line that a crash has torn, so that the next event has a line of its own; whether there was one."""
    with writing(path):
        if not path.exists() or path.stat().st_size == 0:
            return False
        with path.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
            if torn:
                stream.write(b"\n")
    return torn


class Journal:
    """Writer of one run directory.

    Its directory (an absolute path) is made if missing, for its owner alone. Events are appended to those of an earlier
    run in it; a last line that a crash has torn is closed first. ``listener`` is called with every event once it is
    written; ``facts`` stand in the event of this start.
    """

    def __init__(
        self,
        directory: Path,
        listener: Callable[[dict[str, Any]], None] | None = None,
        **facts: Any,
    ) -> None:
        self.directory = directory
        self._listener = listener
        self.path = directory / "rounds.jsonl"
        with writing(self.path):
            private_folder(directory)
            if self.path.exists():  # of an earlier start, perhaps by an older program
                close_to_others(directory)
                close_to_others(self.path)
        torn = close_torn_line(self.path)
        self.status("running")
        self.event("journal", version=VERSION, torn_line=torn, **facts)

    def event(self, event: str, /, **fields: Any) -> None:
        """Append one event; the line is complete on disk when this returns."""
        record = append_event(self.path, event, **fields)
        if self._listener is not None:
            self._show(self._listener, record)

    def _show(self, listener: Callable[[dict[str, Any]], None], record: dict[str, Any]) -> None:
        """Show an event; a display that fails (a closed pipe, say) is told once and left out from then on."""
        try:
            listener(record)
        except Exception as error:
            self._listener = None
            log.warning("events are no longer shown, the run goes on: %s", error)

    def remembered_name(self, name: str, resuming: bool) -> str:
        """Remember the run's name on its first start; return it when the run is resumed."""
        path = self.directory / "run.json"
        if resuming and path.exists():
            return str(parse_json(path.read_text())["name"])
        self._write("run.json", json.dumps({"name": name}) + "\n")
        return name

    def config(self, text: str) -> None:
        """Save the resolved configuration (YAML text)."""
        self._write("config.yaml", text)

    def results(self, results: Mapping[str, Any]) -> None:
        """Save the results so far."""
        self._write("results.json", json.dumps(to_json(results), indent=2, allow_nan=False) + "\n")

    def bank(self, name: str, tensors: Mapping[str, NDArray[Any]], **metadata: str) -> None:
        """Save the final shared tensors of one strategy and seed."""
        path = self.directory / "banks" / f"{name}.safetensors"
        with writing(path.parent):
            save_tensors(path, tensors, metadata)

    def status(self, state: str, reason: str | None = None) -> None:
        """Say how the run stands: ``running``, ``finished`` or ``failed`` with a reason."""
        record = {"state": state, "reason": reason, "time": time.time()}
        self._write("status.json", json.dumps(record) + "\n")

    def _write(self, name: str, text: str) -> None:
        with writing(self.directory / name):
            atomic_write_text(self.directory / name, text)
