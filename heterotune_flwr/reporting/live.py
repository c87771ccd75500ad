"""The live view of a run on a terminal: drawn from how it stands, several times a second."""

from __future__ import annotations

import time

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from heterotune_flwr.jsons import as_mapping, as_number
from heterotune_flwr.names import printable
from heterotune_flwr.reporting.standing import Follower, Standing
from heterotune_flwr.reporting.status import doing, time_left, trouble
from heterotune_flwr.reporting.tables import TITLES, human_bytes

#: Model types and clients in trouble that have a line each.
_TYPES, _TROUBLES = 8, 3
#: Columns that the view takes at most: a bar across a wide screen says no more.
_WIDEST = 100
HINT = "Ctrl-C stops it and says how to go on after the last finished round"


def clock(seconds: float) -> str:
    """``75 -> 1:15``, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveView:
    """What a person looks at while a run goes on; ``began`` is seconds since 1970."""

    def __init__(self, follower: Follower, began: float) -> None:
        self.follower = follower
        self.began = began
        self._share = 0.0
        self._spinner = Spinner("dots", style="cyan")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it for a console of this width."""
        now, standing = time.time(), self.follower.standing
        width = min(options.max_width, _WIDEST)
        parts: list[RenderableType] = [Text(), self._head(now), self._bar(now)]
        parts.append(self._doing(now))
        if numbers := _numbers(standing):
            parts.append(Text(numbers))
        if standing.types:
            parts.append(_types(standing, width))
        failing = standing.failing
        parts += [_line(trouble(one), "yellow") for one in failing[:_TROUBLES]]
        if len(failing) > _TROUBLES:
            parts.append(
                _line(f"and {len(failing) - _TROUBLES} more (heterotune status)", "yellow")
            )
        parts.append(_line(HINT, "dim"))
        yield from console.render(Group(*parts), options.update_width(width))

    def share(self, now: float) -> float:
        """Share of the run that is done, which never goes back."""
        self._share = max(self._share, self.follower.time_left.share(now, self.began))
        return self._share

    def _head(self, now: float) -> RenderableType:
        standing, plan = self.follower.standing, self.follower.time_left.plan
        left = self.follower.time_left.seconds(now)
        said = ", ".join(filter(None, [clock(now - self.began), time_left(left)]))
        if standing.strategy is None:
            name = "starting"
        else:
            name = f"{TITLES.get(standing.strategy, standing.strategy)}, seed {standing.seed}"
            number = self.follower.time_left.number
            name += f" ({number} of {plan.experiments})" if plan.experiments > 1 else ""
            name += f", {standing.of} rounds"
        row = Table.grid(expand=True)
        row.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_row(_line(name, "bold"), Text(said))
        return row

    def _doing(self, now: float) -> RenderableType:
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=1)
        row.add_column(no_wrap=True)
        standing = self.follower.standing
        row.add_row(self._spinner, _line(doing(standing, now) or standing.state))
        return row

    def _bar(self, now: float) -> RenderableType:
        share = self.share(now)
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right", width=5)
        row.add_row(ProgressBar(total=1.0, completed=share), Text(f"{100 * share:.0f} %"))
        return row


def _line(text: str, style: str = "") -> Text:
    """One line, cut where the screen ends; nothing in it is markup, or obeyed by the terminal."""
    return Text(printable(text.replace("\n", " ")), style=style, no_wrap=True, overflow="ellipsis")


def _numbers(standing: Standing) -> str:
    """Loss, accuracy (of generated answers ROUGE-L) and bytes so far."""
    parts = [] if standing.loss is None else [f"loss {standing.loss:.3f}"]
    if standing.rouge_l is not None:
        parts.append(f"ROUGE-L {100 * standing.rouge_l:.1f} % (round {standing.tested_round})")
    elif standing.accuracy is not None:
        parts.append(f"accuracy {100 * standing.accuracy:.1f} % (round {standing.tested_round})")
    if standing.bytes_up or standing.bytes_down:
        parts.append(
            f"{human_bytes(standing.bytes_up)} up, {human_bytes(standing.bytes_down)} down"
        )
    return ", ".join(parts)


def _types(standing: Standing, width: int) -> RenderableType:
    """A line per type: who has answered in this round, and the last round's means."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("type", no_wrap=True, overflow="ellipsis", max_width=max(12, width - 40))
    for head in ("answered", "train loss", "train acc."):
        table.add_column(head, justify="right", no_wrap=True)
    waiting, requested = set(standing.asked), set(standing.requested)
    for key in sorted(standing.types)[:_TYPES]:
        of_type = {c.client_id for c in standing.clients.values() if c.type_key == key}
        asked = of_type & requested
        means = as_mapping(standing.types[key])
        loss, accuracy = as_number(means.get("loss")), as_number(means.get("accuracy"))
        table.add_row(
            _line(key),
            f"{len(asked - waiting)} of {len(asked)}" if asked else "",
            "" if loss is None else f"{loss:.3f}",
            "" if accuracy is None else f"{100 * accuracy:.1f} %",
        )
    if len(standing.types) > _TYPES:
        table.add_row(_line(f"and {len(standing.types) - _TYPES} more types", "dim"))
    return table
