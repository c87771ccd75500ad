"""The tables of a finished run, from ``results.json`` alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from heterotune_flwr.names import printable
from heterotune_flwr.protocol.metrics import MODEL_TITLES
from heterotune_flwr.reporting.measures import (
    MEASURE_TITLES,
    OVERALL,
    Spread,
    configured,
    guest_types,
    has_measure,
    kept_means,
    kept_measure,
    mean_accuracy,
    measures_taken,
    paired_gain,
    shares_nothing,
    strategies_of,
    subject_of,
    taken,
    types_of,
)

TITLES = {
    "local_only": "local only",
    "within_type": "within type",
    "fedit": "FedIT (LoRA)",
    "heterotune": "HeteroTune",
    "mean": "plain mean",
}
#: Columns where the output is no terminal and nobody says how wide it is.
PLAIN_WIDTH = 110
#: A table is as wide as its title at least, which would be broken otherwise.
MIN_WIDTH = 48
#: Strategies that stand side by side; more are one below the other.
SIDE_BY_SIDE = 3


def _title(strategy: str) -> str:
    return TITLES.get(strategy, strategy)


def _shown(name: str) -> Text:
    """A name out of a results file: no markup in it counts, and nothing a terminal would obey."""
    return Text(printable(name))


def _cell(value: Spread | None, seeds: int, sign: str = "") -> str:
    """A measure, or with ``+`` for ``sign`` a gain."""
    if value is None:
        return "-"
    mean = f"{value[0]:{sign}.1f}"
    return f"{mean} ± {value[1]:.1f}" if seeds > 1 else mean


def accuracy_table(results: Mapping[str, Any], metric: str = "global_accuracy") -> Table:
    """A measure in percent by type and strategy, and gains in points; more than three strategies have a row each."""
    if len(strategies_of(results)) > SIDE_BY_SIDE:
        return _tall_table(results, metric)
    strategies = strategies_of(results)
    seeds = len({run["seed"] for run in results["runs"]})
    subject = subject_of(strategies)
    rivals = [name for name in strategies if name != subject]
    table = _empty_table(metric)
    table.add_column("model type", no_wrap=True)
    for strategy in strategies:
        table.add_column(_shown(_title(strategy)), justify="right", no_wrap=seeds > 1)
    for rival in rivals:
        table.add_column(
            _shown(f"gain over {_title(rival)}"),
            justify="right",
            min_width=12 if seeds > 1 else None,
        )
    types, guests = types_of(results), guest_types(results)
    for type_key in [*types, OVERALL]:
        style = "bold" if type_key == OVERALL else None
        cells = _row(results, strategies, rivals, type_key, metric, seeds)
        label = f"{type_key} (guest)" if type_key in guests else type_key
        table.add_row(
            _shown(label), *cells, style=style, end_section=type_key in (types[-1], OVERALL)
        )
    if personal := _own_tests(results, metric):
        cells = _row(results, strategies, rivals, OVERALL, personal, seeds)
        table.add_row("on own tests", *cells)
    table.caption = _shown(_accuracy_note(results, seeds, subject if rivals else None))
    return table


def _empty_table(metric: str) -> Table:
    scope, _, measure = metric.partition("_")
    which = "the global test" if scope == "global" else "the clients' own tests"
    return Table(
        title=f"{MEASURE_TITLES[measure]} (%) on {which}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        min_width=MIN_WIDTH,
    )


def _own_tests(results: Mapping[str, Any], metric: str) -> str | None:
    """The same measure on own tests: what sharing gains on the global one it may lose on skewed data of one's own."""
    scope, _, measure = metric.partition("_")
    own = f"personal_{measure}"
    return own if scope == "global" and has_measure(results, own) else None


def _tall_table(results: Mapping[str, Any], metric: str) -> Table:
    """A row per strategy, a column per type."""
    strategies, types, guests = strategies_of(results), types_of(results), guest_types(results)
    seeds = len({run["seed"] for run in results["runs"]})
    subject, personal = subject_of(strategies), _own_tests(results, metric)
    table = _empty_table(metric)
    table.add_column("strategy", no_wrap=True)
    for key in types:
        backbone, _, bits = key.partition("@")  # the bits on a line of their own
        guest = " (guest)" if key in guests else ""
        table.add_column(_shown(f"{backbone}\n@{bits}{guest}"), justify="right", no_wrap=True)
    for head in (OVERALL.replace(" ", "\n"), *(["on own\ntests"] if personal else []), "gain"):
        table.add_column(head, justify="right", no_wrap=True)
    for name in strategies:
        cells = [mean_accuracy(results, name, key, metric) for key in (*types, OVERALL)]
        cells += [mean_accuracy(results, name, OVERALL, personal)] if personal else []
        gain = None if name == subject else paired_gain(results, subject, name, OVERALL, metric)
        shown = "" if name == subject else _cell(gain, seeds, "+")
        style = "bold" if name == subject else None
        table.add_row(
            _shown(_title(name)), *[_cell(cell, seeds) for cell in cells], shown, style=style
        )
    table.caption = _shown(_accuracy_note(results, seeds, subject))
    return table


def _row(
    results: Mapping[str, Any],
    strategies: Sequence[str],
    rivals: Sequence[str],
    type_key: str,
    metric: str,
    seeds: int,
) -> list[str]:
    subject = subject_of(strategies)
    values = [mean_accuracy(results, name, type_key, metric) for name in strategies]
    gains = [paired_gain(results, subject, rival, type_key, metric) for rival in rivals]
    return [_cell(value, seeds) for value in values] + [_cell(gain, seeds, "+") for gain in gains]


def _accuracy_note(results: Mapping[str, Any], seeds: int, subject: str | None) -> str:
    """What the numbers are; ``subject``: whose gains are shown."""
    clients = max(len(run["clients"]) for run in results["runs"])
    total = max(run.get("population", 0) for run in results["runs"])
    note = f"mean over {clients} clients"
    if total > clients:
        note += f", a fixed sample of {total} (server.evaluate_clients)"
    paired = f"; gains: {_title(subject)} over the others, in points, by client" if subject else ""
    if seeds == 1:
        return (
            f"{note}, 1 seed: small differences are noise (more seeds: run.seeds=[0,1,2]){paired}"
        )
    return f"{note} and {seeds} seeds, ± standard deviation over the seeds{paired}"


def human_bytes(count: float) -> str:
    """``28416 -> "28.4 kB"`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def kept_table(results: Mapping[str, Any]) -> Table | None:
    """What clients took home, by strategy, and how it does on their own tests; None where nobody chose."""
    measure = kept_measure(results)
    if measure is None:
        return None
    seeds = len({run["seed"] for run in results["runs"]})
    table = Table(
        title=f"Taken home: {MEASURE_TITLES[measure]} (%) on the clients' own tests",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        min_width=MIN_WIDTH,
    )
    table.add_column("strategy", no_wrap=True)
    for head in (*MODEL_TITLES.values(), "taken home"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("who took what")
    for name in strategies_of(results):
        means, counts = kept_means(results, name, measure)
        if any(counts.values()):
            cells = [_cell(means[model], seeds) for model in (*MODEL_TITLES, "taken")]
            table.add_row(
                _shown(_title(name)),
                *cells,
                taken(counts, shares_nothing(configured(results), name)),
            )
    table.caption = (
        "each client keeps the best of three on examples of its own, apart from this test "
        "(docs/take-home.md)"
    )
    if measure == "accuracy":
        table.caption += "; untouched: without the client's label frequencies"
    return table


def _saved(part: float, whole: float) -> str:
    if not whole:
        return "-"
    return "> 99.99 %" if 0 < part / whole < 0.0001 else f"{100 * (1 - part / whole):.2f} %"


def bytes_table(results: Mapping[str, Any]) -> Table:
    """Bytes per client-round, each way, against LoRA r=16 and the whole model; one-time bytes apart."""
    table = Table(
        title="Bytes on the wire per client and round", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("strategy", no_wrap=True)
    for name in ("up", "down", "saved vs LoRA r=16", "saved vs the model", "once per run"):
        table.add_column(name, justify="right")
    for strategy in strategies_of(results):
        counts = next(run["bytes"] for run in results["runs"] if run["strategy"] == strategy)
        up = counts["up_per_client_round"]
        once = counts["one_time_up"] + counts["one_time_down"]
        table.add_row(
            _shown(_title(strategy)),
            human_bytes(up),
            human_bytes(counts["down_per_client_round"]),
            _saved(up, counts["lora16_bytes"]),
            _saved(up, counts["model_bytes"]),
            human_bytes(once),
        )
    counts = results["runs"][0]["bytes"]
    table.caption = (
        f"one way of LoRA r=16 on all linear layers {human_bytes(counts['lora16_bytes'])}, of the model in bf16 "
        f"{human_bytes(counts['model_bytes'])} (means over the clients); saved: up against one way of each; "
        "once per run: all clients together, the same questions in every row"
    )
    table.caption_justify = "left"
    return table


def faults(results: Mapping[str, Any]) -> list[str]:
    """One line per strategy and seed in which updates were refused or rounds skipped."""
    lines = []
    for run in results["runs"]:
        counts: dict[str, Mapping[str, int]] = run.get("refused", {})
        parts = []
        if counts:
            total = sum(sum(by_check.values()) for by_check in counts.values())
            worst = sorted(counts, key=lambda cid: (-sum(counts[cid].values()), cid))[:3]
            named = "; ".join(
                f"{cid}: " + ", ".join(f"{check} {n}" for check, n in sorted(counts[cid].items()))
                for cid in worst
            )
            more = f"; and {len(counts) - 3} more" if len(counts) > 3 else ""
            parts.append(f"refused {total} times, of {len(counts)} clients ({named}{more})")
        if run.get("skipped_rounds"):
            parts.append(f"{len(run['skipped_rounds'])} rounds skipped")
        if parts:
            lines.append(f"{_title(run['strategy'])}, seed {run['seed']}: {', '.join(parts)}")
    return lines


def _print(
    console: Console, results: Mapping[str, Any], directory: Path, metrics: Sequence[str]
) -> None:
    if results["runs"]:
        if types_of(results):
            for metric in metrics:
                console.print(accuracy_table(results, metric))
            if (table := kept_table(results)) is not None:
                console.print(table)
        else:
            console.print(
                "Nothing was evaluated: no client answered a test (rounds.jsonl says why: client_failed).\n"
            )
        console.print(bytes_table(results))
        for line in faults(results):
            console.print(printable(line), soft_wrap=True, highlight=False, markup=False)
    console.print(f"run directory: {directory}", soft_wrap=True, highlight=False, markup=False)


def final_table(results: Mapping[str, Any], directory: Path, width: int = PLAIN_WIDTH) -> str:
    """The end of a run as text: accuracies, bytes, where everything is."""
    text = io.StringIO()
    console = Console(file=text, width=width, no_color=True)
    console.width = _wide_enough(console, results)
    _print(console, results, directory, measures_taken(results))
    return text.getvalue()


def _wide_enough(console: Console, results: Mapping[str, Any]) -> int:
    """The console's width, or what a row per strategy needs to be uncut."""
    if len(strategies_of(results)) <= SIDE_BY_SIDE or not types_of(results):
        return console.width
    roomy = console.options.update(max_width=10 * PLAIN_WIDTH)
    table = accuracy_table(results, next(iter(measures_taken(results)), "global_accuracy"))
    return max(console.width, Measurement.get(console, roomy, table).maximum)


def show(results: Mapping[str, Any], directory: Path, personal: bool = False) -> None:
    """Print the tables to the terminal, in colour where it has any; ``personal``: the clients' own tests too."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
        console.width = _wide_enough(console, results)
    _print(console, results, directory, measures_taken(results, personal))
