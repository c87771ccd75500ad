"""What a person sees while a run goes on, from its journal's events: a live view on a terminal, lines elsewhere."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any, Self

from rich.console import Console
from rich.live import Live

from heterotune_flwr.names import printable
from heterotune_flwr.reporting.lines import LastingLines, with_loss
from heterotune_flwr.reporting.live import LiveView
from heterotune_flwr.reporting.standing import Follower, Standing, how_far
from heterotune_flwr.reporting.status import doing, time_left
from heterotune_flwr.reporting.tables import human_bytes
from heterotune_flwr.reporting.time_left import Plan
from heterotune_flwr.schema import Config

Event = dict[str, Any]
#: A line of a round, or of who has answered, at most this often where the output is no terminal.
LINE_SECONDS = 2.0
#: After so long without a line, one tells what is being done; then after twice as long, and so on, but for these most.
SILENCE_SECONDS, LONGEST_SILENCE = 15.0, 300.0


class Display:
    """Takes a run's events and shows nothing of them; use as a context manager."""

    def __enter__(self) -> Self:
        """Start the display."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the display."""

    def __call__(self, event: Event) -> None:
        """Take one event of the journal."""


class JsonLines(Display):
    """Prints every event as one line of JSON."""

    def __call__(self, event: Event) -> None:
        """Print one event."""
        print(json.dumps(event), flush=True)


class RunProgress(Display):
    """Shows a run's events.

    ``config`` tells how much there is to do. A terminal ``console`` gets a live view below the lines that last,
    anything else lines alone.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.console = console or Console()
        self.lines = LastingLines(config)
        self.follower = Follower(Standing(config.run.dir or "", "running"), Plan.of(config))
        self._last_line, self._last_passing = time.monotonic(), -math.inf
        self._live: Live | None = None
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start the display."""
        if self.console.is_terminal:
            view = LiveView(self.follower, began=time.time())
            self._live = Live(view, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._watch = threading.Thread(target=self._break_silence, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the display."""
        self._over.set()
        if self._live is not None:
            self._live.stop()
        if self._watch is not None:
            self._watch.join()

    def __call__(self, event: Event) -> None:
        """Take one event of the journal."""
        self.follower.take(event)
        for line in self.lines.of(event):
            self._line(line)
        if event["event"] == "round":
            self._passing(self._of_round(event))
        elif event["event"] == "progress":
            self._passing(f"  {how_far(event)}")

    def _line(self, text: str) -> None:
        """Write a line; above the live view, where there is one."""
        self._last_line = time.monotonic()
        # A file's reader wraps lines; on a terminal they break between words.
        wrapped = self._live is None
        self.console.print(printable(text), soft_wrap=wrapped, highlight=False, markup=False)

    def _passing(self, text: str) -> None:
        """Write a line now and then, where there is no live view to tell it."""
        if self._live is None and time.monotonic() - self._last_passing > LINE_SECONDS:
            self._last_passing = time.monotonic()
            self._line(text)

    def _of_round(self, event: Event) -> str:
        text = f"  round {event['round']}/{event['of']}: {event.get('clients', '?')} clients"
        text += f"{with_loss(event)}, {human_bytes(event['bytes_up'] + event['bytes_down'])} so far"
        left = time_left(self.follower.time_left.seconds(time.time()))
        return f"{text}, {left}" if left else text

    def _break_silence(self) -> None:
        """Say what is being done wherever nothing was said for a while."""
        silence, told = SILENCE_SECONDS, self._last_line
        while not self._over.wait(1.0):
            if self._last_line != told:  # something has happened
                silence = SILENCE_SECONDS
            if time.monotonic() - self._last_line > silence:
                standing, now = self.follower.standing, time.time()
                self._line(f"  {doing(standing, now) or 'still at work'}")
                silence = min(2 * silence, LONGEST_SILENCE)
            told = self._last_line
