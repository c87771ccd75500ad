"""What whole runs come to where answers are several tokens long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.report.sections import load_results, number, said, section, shown, table, told_gain


def generation() -> str:
    """Answers of several tokens, in whole runs."""
    known, named = load_results("generation"), {
        "local_only": "trained alone", "within_type": "within type", "bank": "bank alone",
        "heterotune": "`heterotune`, with a phase", "shared": "`heterotune`, shared in all rounds",
    }  # fmt: skip
    family = {
        "smollm2_gemma": "SmolLM2 and Gemma-3",
        "smollm2_pruned": "SmolLM2 and its pruned sibling",
    }
    blocks = [
        block
        for name, told in family.items()
        if name in known
        for block in _family(known[name], f"{told}, seeds {', '.join(map(str, known[name]['seeds']))}", named)
    ]  # fmt: skip
    return section(
        "Generated answers",
        said("The same question as in [answers of several tokens](#answers-of-several-tokens), asked of whole runs: "
             "four tasks of Natural Instructions, a task per client, two clients of each of two types, 60 examples "
             "each. Public prompts are of the same tasks, answered once by SmolLM2. Rates and rounds are the "
             f"laboratory's, chosen on dev texts.{'' if blocks else ' Not measured yet.'}"),
        *blocks,
    )  # fmt: skip


def _family(values: dict[str, Any], told: str, named: dict[str, str]) -> Iterator[str]:
    """Tables of a family, of the rows that were measured."""
    named = {row: title for row, title in named.items() if f"{row}.global_loss" in values}
    types = [key.rpartition(".")[2] for key in values if key.startswith("bank.global_loss.")]

    def line(title: str, row: str) -> tuple[str, ...]:
        losses = (f"{row}.global_loss.{one}" for one in types)
        more = (f"{row}.personal_loss", f"{row}.taken.personal_loss")
        return (title, *(number(values, key, 2) for key in (*losses, *more)),
                str(values.get(f"{row}.took_federated", "-")))  # fmt: skip

    yield shown(
        f"{told}. Loss per answer token on all tasks, by type; on a client's own task, of the federated model and of "
        "what was taken home; how many clients took the federated model.",
        "science.generation",
        table(
            ("row", *(one.partition("@")[0] for one in types), "own task", "own, taken home", "took it"),
            [line("untouched", "untouched"), *(line(title, row) for row, title in named.items())],
        ),
    )  # fmt: skip
    gains = [
        (title, *(_gain_of(values, f"{row}.over_{rival}.{measure}")
                  for measure in ("global_loss", "personal_loss") for rival in ("local_only", "within_type")))
        for row, title in named.items() if f"{row}.over_within_type.global_loss.gain" in values
    ]  # fmt: skip
    over = ", with a 95 % interval over seeds" if len(values["seeds"]) > 1 else ""
    yield shown(
        f"{told}. What sharing across types adds to the loss (below 0 is better){over}.",
        "science.generation",
        table(("row", "all, over alone", "all, over within", "own, over alone", "own, over within"), gains),
    )  # fmt: skip
    if "bank.global_rouge_l" in values:
        yield shown(
            f"{told}. ROUGE-L in percent of written answers.",
            "science.generation --generate 64",
            table(("row", "all tasks", "own task"), [
                (title, *(number(values, f"{row}.{m}") for m in ("global_rouge_l", "personal_rouge_l")))
                for row, title in {"untouched": "untouched", **named}.items()
            ]),
        )  # fmt: skip


def _gain_of(values: dict[str, Any], key: str) -> str:
    """A gain in nats."""
    ends = ("gain", "low", "high")
    return told_gain({end: values[f"{key}.{end}"] for end in ends if f"{key}.{end}" in values}, 2)
