"""Live progress of a run from its journal's events: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from heterotune_flwr.names import printable
from heterotune_flwr.reporting.measures import taken
from heterotune_flwr.reporting.tables import TITLES, human_bytes
from heterotune_flwr.schema import Config

Event = dict[str, Any]
#: A line at most this often when the output is not a terminal.
LINE_SECONDS = 2.0
#: Events that are a line, and the line; those that are more have a method below.
_LINES = {
    "channel_note": "  {text}",
    "channel_off": "  {channel} is off: {reason}",
    "checkpoint_damaged": "  a checkpoint was passed over: {reason}",
    "client_failed": "  {client_id} failed: {reason}",
    "cooldown": "  {client_id} failed too often: not asked until after round {until}",
    "payload_refused": "  {channel} of {client_id} are not used: {reason}",
    "personalization_phase": "  from round {round} on: a bank per type, taught by what all types predict",
    "refused": "  refused {client_id}: {reason}",
    "returned": "  {client_id} is asked again",
    "sent_again": "  {client_id}: its process died, asked again",
    "skipped": "  round {round} skipped: {usable} usable updates, {needed} needed",
}


class RunProgress:
    """Shows strategy, round, client, loss, bytes and the time left; use as a context manager.

    ``config`` tells how much there is to do. A terminal ``console`` gets a bar, anything else plain lines.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.console = console or Console()
        self.experiments = len(config.run.seeds) * len(config.run.compare)
        self.rounds = config.server.rounds
        self.alignment = config.alignment
        self.clients = (
            sum(entry.clients for entry in config.types if not entry.guest)
            * config.server.participation
        )
        self._finished = 0
        self._round = 0
        self._replies = 0
        self._started: float | None = None
        self._last_line = -LINE_SECONDS
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Start the display."""
        if self.console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task("starting Flower", total=1.0, note="")
        else:
            self._line("starting Flower and its workers")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the display."""
        if self._task is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Take one event of the journal."""
        kind = event["event"]
        if kind in _LINES:
            self._line(_LINES[kind].format_map(event))
        if handler := getattr(self, f"_on_{kind}", None):
            handler(event)

    @property
    def fraction(self) -> float:
        """Share of the run's client-rounds that is done."""
        within = self._round + min(1.0, self._replies / max(1.0, self.clients))
        done = self._finished + min(1.0, within / max(1, self.rounds))
        return min(1.0, done / max(1, self.experiments))

    def _eta(self) -> str:
        if self._started is None or self.fraction <= 0.02:
            return ""
        left = (time.monotonic() - self._started) * (1 - self.fraction) / self.fraction
        return f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"

    def _line(self, text: str) -> None:
        """Write a line; over the bar, where there is one."""
        self.console.print(printable(text), soft_wrap=True, highlight=False, markup=False)

    def _passing(self, text: str) -> None:
        """Write a line now and then, where there is no bar to tell it."""
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line > LINE_SECONDS:
            self._last_line = now
            self._line(text)

    def _show(self, description: str, note: str) -> None:
        if self._task is not None:
            self._bar.update(
                self._task,
                completed=self.fraction,
                description=printable(description),
                note=printable(note) + self._eta(),
            )

    def _name(self, event: Event) -> str:
        title = TITLES.get(event.get("strategy", ""), event.get("strategy", ""))
        return f"{title} (seed {event.get('seed', 0)})"

    def _on_describe(self, event: Event) -> None:
        types = ", ".join(f"{facts['clients']} x {key}" for key, facts in event["types"].items())
        self._line(f"{event['clients']} clients: {types}")

    def _on_progress(self, event: Event) -> None:
        done = "asked" if event["what"] == "asking" else "tested"
        text = f"{done} {event['done']} of {event['clients']} clients"
        self._show(text, "")
        self._passing(f"  {text}")

    def _on_left_out(self, event: Event) -> None:
        name = event["client_id"] or f"node {event['node_id']}"
        self._line(f"  {name} does not take part: {event['reason']}")

    def _on_aligning(self, event: Event) -> None:
        what = "for the maps" if event["part"] == "slots" else "as whole texts"
        kept = "kept for later runs; " if event.get("cached") else ""
        self._line(
            f"one client each of {', '.join(event['types'])} reads up to {event['anchors']} public anchors {what} "
            f"({kept}minutes for a real model on a CPU)"
        )

    def _on_align(self, event: Event) -> None:
        quality = ", ".join(
            f"{key} {'/'.join(f'{value:.2f}' for value in values)}"
            for key, values in event["quality"].items()
        )
        origin = "from the cache" if event.get("cached") else f"{human_bytes(event['bytes_up'])} up"
        self._line(f"aligned ({origin}); held-out canonical correlation: {quality}")
        least, held = self.alignment.quality_threshold, self.alignment.control == "none"
        short = [key for key, values in event["quality"].items() if held and min(values) < least]
        if short:
            self._line(
                f"  below alignment.quality_threshold ({least:g}), so not shared with other types there: "
                f"{', '.join(short)}"
            )

    def _on_start(self, event: Event) -> None:
        self._started = self._started or time.monotonic()
        self._round, self._replies = 0, 0
        self._line(f"{self._name(event)}: {event['of']} rounds")

    def _on_resumed(self, event: Event) -> None:
        self._round = event["round"]
        self._line(f"{self._name(event)}: goes on after round {event['round']}")

    def _on_already_finished(self, event: Event) -> None:
        self._finished += 1
        self._line(f"{self._name(event)}: had finished")

    def _on_train_reply(self, event: Event) -> None:
        self._replies += 1
        loss = event.get("loss")
        note = f"{event['client_id']} ({event['type']})"
        note += f" loss {loss:.3f}" if isinstance(loss, float) else ""
        self._show(f"{self._name(event)} round {event['round']}/{event['of']}", note)

    def _on_round(self, event: Event) -> None:
        self._round, self._replies = event["round"], 0
        loss = event.get("loss")
        text = f"  round {event['round']}/{event['of']}: {event.get('clients', '?')} clients"
        text += f", loss {loss:.3f}" if isinstance(loss, float) else ""
        text += f", {human_bytes(event['bytes_up'] + event['bytes_down'])} so far"
        self._passing(text + self._eta())
        self._show(f"{self._name(event)} round {event['round']}/{event['of']}", "")

    def _on_evaluate(self, event: Event) -> None:
        accuracy = event["overall"].get("global_accuracy_mean")
        if accuracy is None:
            return
        text = f"  after round {event['round']}: accuracy {100 * accuracy:.1f} %"
        generated = event["overall"].get("global_rouge_l_mean")
        text += f", ROUGE-L {100 * generated:.1f} %" if generated is not None else ""
        sampled = event.get("tested", 0) < event.get("clients", 0)
        text += " on the global test"
        text += f", {event['tested']} of {event['clients']} clients tested" if sampled else ""
        self._line(text)
        if kept := event.get("kept"):
            self._line(f"  taken home: {taken(kept['took'])}")

    def _on_slices(self, event: Event) -> None:
        shown = [f"{k} {100 * v:.1f} %" for k, v in event["accuracies"].items() if v is not None]
        self._line(f"  slices before any training: {', '.join(shown)}")

    def _on_strategy_end(self, event: Event) -> None:
        self._finished += 1
        self._round, self._replies = 0, 0
        self._line(f"{self._name(event)} done in {event['seconds']:.0f} s")

    def _on_guests(self, event: Event) -> None:
        names, loss = ", ".join(event["types"]), event.get("loss")
        text = f"  guests ({names}) take what all types share"
        if event["clients"]:
            text += f" and fit what the others predict: {event['clients']} clients"
        text += f", loss {loss:.3f}" if isinstance(loss, float) else ""
        self._line(text)

    def _on_skipped(self, event: Event) -> None:
        self._round, self._replies = event["round"], 0

    def _on_round_closed(self, event: Event) -> None:
        left = ", ".join(event["unawaited"])
        self._line(f"  round {event['round']} closed without waiting for {left}")
