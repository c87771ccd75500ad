"""What leaving out each part of the default costs, on labels and on answers of several tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.sections import load_results, said, section, shown, table
from benchmarks.science.mechanism_rows import BOTH, FULL, ROWS, TEXT

_INSTRUCTIONS = (
    "Instructions: four tasks of Natural Instructions, a task per client, embedded family, two clients of each of two "
    "types, 6 rounds, public inputs of the same tasks, answered by SmolLM2; its rate is not tuned."
)
_NOT_YET = (
    "Not measured yet: answers of several tokens (what predictions and the bank carry there: [answers of several "
    "tokens](#answers-of-several-tokens))."
)


def mechanisms() -> str:
    """The table, and the parts that are off."""
    known = load_results("mechanisms")
    tasks = [task for task in BOTH if f"{task}.{FULL}.level" in known]
    levels = ", ".join(
        f"{task} {known[f'{task}.{FULL}.level']:.2f} nats" if task in TEXT
        else f"{task} {100 - known[f'{task}.{FULL}.level']:.1f} %"
        for task in tasks
    )  # fmt: skip
    seeds = "; ".join(f"{t} {known[f'{t}.seeds'][0]} to {known[f'{t}.seeds'][-1]}" for t in tasks)
    rates = ", ".join(f"{task} {known[f'{task}.rate']:g}" for task in tasks)
    return section(
        "What each part is worth",
        said("Every part of `heterotune` left out alone: SmolLM2-135M nf4 and Gemma-3-270M int8, one "
        f"client each. {_INSTRUCTIONS if TEXT[0] in tasks else _NOT_YET} All rows have one rate ({rates}), of labels "
        "the best of the whole on dev; so a row could be better at its own. With two clients agreement weights say "
        "nothing, and neither does the clip, which protects. The bank is left out by sharing it in the first round "
        f"alone. Seeds: {seeds}. Full: {levels}."),
        *(shown(told, "science.mechanisms", table(("part", *tasks), rows)) for told, rows in (
            ("What leaving it out costs on the common test, with a 95 % interval over seeds: points of accuracy, or "
             "nats per answer token (instructions). Bold: it surely costs.", _rows(known, tasks, False)),
            ("The same of parts that are off in the default: what having them gains.", _rows(known, tasks, True)),
        ) if rows),
    )  # fmt: skip


def _rows(known: Mapping[str, Any], tasks: Sequence[str], added: bool) -> list[tuple[str, ...]]:
    return [
        (name.replace("_", " "), *(_cost(known, task, name) for task in tasks))
        for name, row in ROWS.items()
        if row.added == added and any(f"{task}.{name}.cost" in known for task in tasks)
    ]


def _cost(known: Mapping[str, Any], task: str, name: str) -> str:
    stem, digits = f"{task}.{name}.cost", 3 if task in TEXT else 1
    if stem not in known:
        return "-"
    cost, low, high = (known[key] for key in (stem, f"{stem}_low", f"{stem}_high"))
    told = f"{cost:+.{digits}f}"
    return f"{f'**{told}**' if low > 0 else told} ({low:+.{digits}f} .. {high:+.{digits}f})"


SECTIONS = (mechanisms,)
