"""Trackers fed by a run's journal: beside a run that goes on, where nothing may stop it, or all of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.federation.journal import EventReader, Journal, read_events
from heterotune_flwr.federation.resume import run_lock, saved_config
from heterotune_flwr.schema import Config
from heterotune_flwr.track.settings import settings_of
from heterotune_flwr.track.trackers import TRACKERS, Tracker, check_trackers

POLL_SECONDS = 1.0
#: How long a run waits at its end for trackers to write the rest.
PATIENCE_SECONDS = 120.0


class LiveTracking:
    """Writes a run's journal to ``run.track`` while it grows; use as a context manager around the run."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self._journal, self._config = journal, config
        self._reader = EventReader(journal.path, from_start=True)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start to follow."""
        if self._config.run.track:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until everything is written, as long as patience lasts."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
            if self._thread.is_alive():
                self._fail("all", f"did not finish within {PATIENCE_SECONDS:.0f} s")

    def _follow(self) -> None:
        """Until the run is over; the lock keeps ``heterotune track`` from writing to the same place."""
        try:
            with run_lock(self._journal.directory / "track"):
                self._write()
        except ConfigError as error:
            self._fail("all", str(error))

    def _write(self) -> None:
        trackers = self._opened(self._config.run.track)
        while True:
            over = self._over.is_set()
            events = self._reader.new()
            for tracker in list(trackers):
                try:
                    tracker.take(events)
                    tracker.close() if over else tracker.write()
                except Exception as error:
                    # A kind alone: its words may hold an address with a password.
                    self._fail(tracker.name, type(error).__name__)
                    trackers.remove(tracker)
            if over:
                return
            self._over.wait(POLL_SECONDS)

    def _opened(self, names: Sequence[str]) -> list[Tracker]:
        settings = settings_of(self._config)
        opened = []
        for name in names:
            try:
                opened.append(Tracker(name, self._journal.directory, settings))
            except Exception as error:
                self._fail(name, type(error).__name__)
        return opened

    def _fail(self, name: str, reason: str) -> None:
        self._journal.event("track_failed", tracker=name, reason=reason)


def track_afterwards(directory: Path, names: Sequence[str]) -> list[Tracker]:
    """Write a run's journal to trackers; what they had of it before is replaced.

    A configuration that cannot be read (any more) leaves the settings out.

    Raises
    ------
    ConfigError
        It is no run directory, a tracker is unknown or not installed, or the run writes to trackers itself just now.
    FederationError
        A tracker refuses.

    """
    check_trackers(names)
    directory = directory.expanduser().resolve()
    journal = directory / "rounds.jsonl"
    if not journal.is_file():
        raise ConfigError(f"{directory} is no run directory (it has no rounds.jsonl)")
    try:
        settings = settings_of(saved_config(directory))
    except ConfigError:  # of an older program, or damaged: its numbers are shown without settings
        settings = {}
    events = read_events(journal)
    written = []
    with run_lock(directory / "track"):
        for name in names:
            try:
                tracker = Tracker(name, directory, settings)
                tracker.take(events)
                tracker.close()
            except Exception as error:
                # A kind alone: its words may hold an address with a password.
                raise FederationError(
                    f"{TRACKERS[name].title} did not take the run ({type(error).__name__}); look at what its own "
                    "environment variables and settings say"
                ) from error
            written.append(tracker)
    return written
