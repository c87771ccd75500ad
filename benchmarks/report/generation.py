"""What whole runs come to where answers are several tokens long."""

from __future__ import annotations

from typing import Any

from benchmarks.report.sections import load_results, number, said, section, shown, table
from benchmarks.science.generation import MEASURES


def generation() -> str:
    """Answers of several tokens, in whole runs."""
    known, named = load_results("generation"), {
        "local_only": "trained alone", "within_type": "within type", "bank": "bank alone",
        "heterotune": "`heterotune`", "shared": "`heterotune`, shared in all rounds",
    }  # fmt: skip
    family = {"smollm2_gemma": "SmolLM2 and Gemma-3", "embedded": "Embedded family"}
    blocks = []
    for name, told in family.items():
        values = known.get(name)
        if not values:
            continue
        rows = [("untouched", *(number(values, f"untouched.{m}", 2) for m in MEASURES), "")]
        rows += [
            (title, *(number(values, f"{row}.{m}", 2) for m in MEASURES),
             str(values[f"{row}.took_federated"]))
            for row, title in named.items()
        ]  # fmt: skip
        gains = [
            (title, *(_gain_of(values, f"{row}.over_{rival}.{m}")
                      for rival in ("local_only", "within_type") for m in ("global_loss", "global_rouge_l")))
            for row, title in named.items() if f"{row}.over_within_type.global_loss.gain" in values
        ]  # fmt: skip
        seeds = f"seeds {', '.join(map(str, values['seeds']))}"
        interval = ", with a 95 % interval over seeds" if len(values["seeds"]) > 1 else ""
        blocks += [
            shown(f"{told}, {seeds}: loss per answer token and ROUGE-L in percent (64 written answers), on all tasks "
                  "and on a client's own. Last: how many clients took the federated model home.", "science.generation",
                  table(("row", "loss", "own loss", "ROUGE-L", "own ROUGE-L", "took it"), rows)),
            shown(f"{told}: what sharing adds on all tasks (loss: below 0 is better){interval}.", "science.generation",
                  table(("row", "loss, over alone", "ROUGE-L, over alone", "loss, over within", "ROUGE-L, over within"),
                        gains)),
        ]  # fmt: skip
    return section(
        "Generated answers",
        said("The same question as in [answers of several tokens](#answers-of-several-tokens), asked of whole runs: "
             "four tasks of Natural Instructions, a task per client, two clients of each of two types, 60 examples "
             "each. Public prompts are of the same tasks, answered once by SmolLM2. Rates and rounds are the "
             f"laboratory's, chosen on dev texts.{'' if blocks else ' Not measured yet.'}"),
        *blocks,
    )  # fmt: skip


def _gain_of(values: dict[str, Any], key: str) -> str:
    """A gain with its interval, where there is more than one seed."""
    if f"{key}.low" not in values:
        return f"{values[f'{key}.gain']:+.2f}"
    return f"{values[f'{key}.gain']:+.2f} ({values[f'{key}.low']:+.2f} .. {values[f'{key}.high']:+.2f})"
