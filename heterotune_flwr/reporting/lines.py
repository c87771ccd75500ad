"""What lasts of a run's events, as lines: who takes part, who is out and why, what tests say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.federation.journal import client_of
from heterotune_flwr.reporting.measures import shares_nothing, taken
from heterotune_flwr.reporting.tables import TITLES, human_bytes
from heterotune_flwr.schema import Config

Event = Mapping[str, Any]
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
    "results_unreadable": "results of the earlier start cannot be read and are made anew: {reason}",
    "returned": "  {client_id} is asked again",
    "sent_again": "  {client_id}: its process died, asked again",
    "skipped": "  round {round} skipped: {usable} usable updates, {needed} needed",
    "starting": "starting: {what}",
    "stopping": "stopping everything that was started (some seconds)",
    "track_failed": "  tracker {tracker} has stopped, the run goes on: {reason}",
}


def named(event: Event) -> str:
    """``HeteroTune (seed 0)``."""
    strategy = str(event.get("strategy", ""))
    return f"{TITLES.get(strategy, strategy)} (seed {event.get('seed', 0)})"


def with_loss(event: Event) -> str:
    """``, loss 1.234``, empty where an event has none."""
    loss = event.get("loss")
    return f", loss {loss:.3f}" if isinstance(loss, float) else ""


class LastingLines:
    """Turns events into the lines that are told of them anywhere; most events have none."""

    def __init__(self, config: Config) -> None:
        self.alignment, self.strategies = config.alignment, config.strategies

    def of(self, event: Event) -> list[str]:
        """The lines of one event."""
        kind = event["event"]
        if template := _LINES.get(kind):
            return [template.format_map(event)]
        handler = getattr(self, f"_on_{kind}", None)
        return handler(event) if handler else []

    def _on_asking(self, event: Event) -> list[str]:
        return [
            f"asking {event['needed']} clients who they are (the first answers once its worker has loaded its model)"
        ]

    def _on_describe(self, event: Event) -> list[str]:
        types = ", ".join(f"{facts['clients']} x {key}" for key, facts in event["types"].items())
        return [f"{event['clients']} clients: {types}"]

    def _on_left_out(self, event: Event) -> list[str]:
        return [f"  {client_of(event)} does not take part: {event['reason']}"]

    def _on_aligning(self, event: Event) -> list[str]:
        what = "for the maps" if event["part"] == "slots" else "as whole texts"
        kept = "kept for later runs; " if event.get("cached") else ""
        return [
            f"one client each of {', '.join(event['types'])} reads up to {event['anchors']} public anchors {what} "
            f"({kept}minutes for a real model on a CPU)"
        ]

    def _on_align(self, event: Event) -> list[str]:
        quality = ", ".join(
            f"{key} {'/'.join(f'{value:.2f}' for value in values)}"
            for key, values in event["quality"].items()
        )
        origin = "from the cache" if event.get("cached") else f"{human_bytes(event['bytes_up'])} up"
        lines = [f"aligned ({origin}); held-out canonical correlation: {quality}"]
        least, held = self.alignment.quality_threshold, self.alignment.control == "none"
        short = [key for key, values in event["quality"].items() if held and min(values) < least]
        if short:
            lines.append(
                f"  below alignment.quality_threshold ({least:g}), so not shared with other types there: "
                f"{', '.join(short)}"
            )
        return lines

    def _on_start(self, event: Event) -> list[str]:
        return [f"{named(event)}: {event['of']} rounds"]

    def _on_resumed(self, event: Event) -> list[str]:
        return [f"{named(event)}: goes on after round {event['round']}"]

    def _on_already_finished(self, event: Event) -> list[str]:
        return [f"{named(event)}: had finished"]

    def _on_evaluate(self, event: Event) -> list[str]:
        accuracy = event["overall"].get("global_accuracy_mean")
        if accuracy is None:
            return []
        generated = event["overall"].get("global_rouge_l_mean")
        text = f"  after round {event['round']}: "
        if generated is None:
            text += f"accuracy {100 * accuracy:.1f} %"
        else:
            loss = event["overall"].get("global_loss_mean")
            text += f"ROUGE-L {100 * generated:.1f} %{with_loss({'loss': loss})}"
        sampled = event.get("tested", 0) < event.get("clients", 0)
        text += " on the global test"
        text += f", {event['tested']} of {event['clients']} clients tested" if sampled else ""
        kept = event.get("kept")
        if not kept:
            return [text]
        alone = shares_nothing(self.strategies, str(event.get("strategy")))
        return [text, f"  taken home: {taken(kept['took'], alone)}"]

    def _on_slices(self, event: Event) -> list[str]:
        shown = [f"{k} {100 * v:.1f} %" for k, v in event["accuracies"].items() if v is not None]
        return [f"  slices before any training: {', '.join(shown)}"]

    def _on_strategy_end(self, event: Event) -> list[str]:
        return [f"{named(event)} done in {event['seconds']:.0f} s"]

    def _on_guests(self, event: Event) -> list[str]:
        text = f"  guests ({', '.join(event['types'])}) take what all types share"
        if event["clients"]:
            text += f" and fit what the others predict: {event['clients']} clients"
        return [text + with_loss(event)]

    def _on_round_closed(self, event: Event) -> list[str]:
        left = ", ".join(event["unawaited"])
        return [f"  round {event['round']} closed without waiting for {left}"]
