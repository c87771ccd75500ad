"""The tables of a finished run, from ``results.json`` alone."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from heterotune_flwr.errors import FederationError
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.names import printable

TITLES = {
    "local_only": "local only",
    "within_type": "within type",
    "fedit": "FedIT (LoRA)",
    "heterotune": "HeteroTune",
    "mean": "plain mean",
}
#: What a measure is called in a title.
MEASURE_TITLES = {"accuracy": "Accuracy", "exact_match": "Exact match", "rouge_l": "ROUGE-L"}
OVERALL = "all clients"
#: Columns where the output is no terminal and nobody says how wide it is.
PLAIN_WIDTH = 110
#: A table is as wide as its title at least, which would be broken otherwise.
MIN_WIDTH = 48
#: Strategies that stand side by side; more are one below the other.
SIDE_BY_SIDE = 3


def load_results(directory: Path) -> dict[str, Any]:
    """``results.json`` of a run directory (FederationError: there are none (yet))."""
    path = directory / "results.json"
    try:
        results: dict[str, Any] = parse_json(path.read_text())
    except FileNotFoundError as error:
        if not (directory / "rounds.jsonl").exists():
            raise FederationError(f"{directory} is no run directory: no results.json") from error
        raise FederationError(
            f"{directory} holds a run without results yet; heterotune status shows where it stands, "
            f"heterotune run --resume {directory} goes on if it was stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise FederationError(f"{directory} has no readable results.json ({error})") from error
    return results


def _title(strategy: str) -> str:
    return TITLES.get(strategy, strategy)


def _shown(name: str) -> Text:
    """A name out of a results file: no markup in it counts, and nothing a terminal would obey."""
    return Text(printable(name))


def _accuracies(
    results: Mapping[str, Any], strategy: str, type_key: str, metric: str
) -> list[list[float]]:
    """Per seed, the clients' accuracies in percent."""
    return [
        [
            100 * client[metric]
            for client in run["clients"]
            if client[metric] is not None and type_key in (OVERALL, client["type"])
        ]
        for run in results["runs"]
        if run["strategy"] == strategy
    ]


def mean_accuracy(
    results: Mapping[str, Any],
    strategy: str,
    type_key: str = OVERALL,
    metric: str = "global_accuracy",
) -> tuple[float, float] | None:
    """(mean over clients and seeds, standard deviation over seeds) in percent; None without data."""
    means = [
        statistics.fmean(row) for row in _accuracies(results, strategy, type_key, metric) if row
    ]
    if not means:
        return None
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def _strategies(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["strategy"] for run in results["runs"]))


def _types(results: Mapping[str, Any]) -> list[str]:
    return sorted({client["type"] for run in results["runs"] for client in run["clients"]})


def _guest_types(results: Mapping[str, Any]) -> set[str]:
    """Types none of whose clients has examples to train on."""
    clients = [client for run in results["runs"] for client in run["clients"]]
    return {c["type"] for c in clients} - {c["type"] for c in clients if c.get("examples", 1)}


def _cell(value: tuple[float, float] | None, seeds: int) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.1f} ± {value[1]:.1f}" if seeds > 1 else f"{value[0]:.1f}"


def subject_of(strategies: Sequence[str]) -> str:
    """Return the strategy whose gains over the others are shown: HeteroTune, else the last."""
    return "heterotune" if "heterotune" in strategies else strategies[-1]


def paired_gain(
    results: Mapping[str, Any],
    strategy: str,
    rival: str,
    type_key: str = OVERALL,
    metric: str = "global_accuracy",
) -> tuple[float, float] | None:
    """(mean gain in points, its standard deviation over seeds), paired by seed and client.

    Only clients that both strategies measured in a seed count; None without any.
    """

    def by_client(name: str) -> dict[int, dict[str, float]]:
        return {
            run["seed"]: {
                client["client_id"]: 100 * client[metric]
                for client in run["clients"]
                if client[metric] is not None and type_key in (OVERALL, client["type"])
            }
            for run in results["runs"]
            if run["strategy"] == name
        }

    ours, theirs = by_client(strategy), by_client(rival)
    gains = []
    for seed in ours.keys() & theirs.keys():
        common = ours[seed].keys() & theirs[seed].keys()
        if common:
            gains.append(statistics.fmean(ours[seed][c] - theirs[seed][c] for c in sorted(common)))
    if not gains:
        return None
    return statistics.fmean(gains), statistics.stdev(gains) if len(gains) > 1 else 0.0


def _gain(value: tuple[float, float] | None, seeds: int) -> str:
    if value is None:
        return "-"
    return f"{value[0]:+.1f} ± {value[1]:.1f}" if seeds > 1 else f"{value[0]:+.1f}"


def accuracy_table(results: Mapping[str, Any], metric: str = "global_accuracy") -> Table:
    """A measure in percent by type and strategy, and gains in points; more than three strategies have a row each."""
    if len(_strategies(results)) > SIDE_BY_SIDE:
        return _tall_table(results, metric)
    strategies = _strategies(results)
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
    types, guests = _types(results), _guest_types(results)
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
    strategies, types, guests = _strategies(results), _types(results), _guest_types(results)
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
        shown = "" if name == subject else _gain(gain, seeds)
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
    return [_cell(value, seeds) for value in values] + [_gain(gain, seeds) for gain in gains]


def has_measure(results: Mapping[str, Any], metric: str) -> bool:
    """Whether any client was measured that way."""
    return any(c.get(metric) is not None for run in results["runs"] for c in run["clients"])


def measures_taken(results: Mapping[str, Any], personal: bool = True) -> list[str]:
    """Measures in percent that a table is worth: accuracy always, of the others those that were taken."""
    scopes = ("global", "personal") if personal else ("global",)
    names = [f"{scope}_{measure}" for measure in MEASURE_TITLES for scope in scopes]
    return [name for name in names if name == "global_accuracy" or has_measure(results, name)]


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


def _saved(part: float, whole: float) -> str:
    return "-" if not whole else f"{100 * (1 - part / whole):.2f} %"


def bytes_table(results: Mapping[str, Any]) -> Table:
    """Bytes per client-round, each way, against LoRA r=16 and the whole model; one-time bytes apart."""
    table = Table(
        title="Bytes on the wire per client and round", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("strategy", no_wrap=True)
    for name in ("up", "down", "saved vs LoRA r=16", "saved vs the model", "once per run"):
        table.add_column(name, justify="right")
    for strategy in _strategies(results):
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
        "once per run: all clients together"
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
        if _types(results):
            for metric in metrics:
                console.print(accuracy_table(results, metric))
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
    if len(_strategies(results)) <= SIDE_BY_SIDE or not _types(results):
        return console.width
    roomy = console.options.update(max_width=10 * PLAIN_WIDTH)
    return max(console.width, Measurement.get(console, roomy, accuracy_table(results)).maximum)


def show(results: Mapping[str, Any], directory: Path, personal: bool = False) -> None:
    """Print the tables to the terminal, in colour where it has any; ``personal``: the clients' own tests too."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
        console.width = _wide_enough(console, results)
    _print(console, results, directory, measures_taken(results, personal))
