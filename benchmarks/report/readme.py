"""The README's numbers: what stands between its markers, as the result files have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.report.sections import bullets, load_results, number, said, table
from benchmarks.runner import ROOT
from benchmarks.science.headline_suites import CLAIM_SEEDS
from benchmarks.science.tasks import TASKS

PATH = ROOT / "README.md"
_PART = re.compile(r"(<!-- (\w+): made by [^>]*-->\n).*?(<!-- end -->)", flags=re.S)
#: Floor first, ceiling last; a row that was run nowhere is left out.
_ROWS = {
    "untouched": "untouched",
    "pooled_ngrams": "n-grams, no model",
    "alone": "trained alone",
    "within_discriminant": "HeteroTune inside types",
    "fedcof": "FedCOF, all read with SmolLM2",
    "heterotune_plain": "HeteroTune, no class sums",
    "heterotune": "**HeteroTune**",
    "pooled_data": "all data in one place, a client's steps",
}
#: Clients of each type.
_CLIENTS = (1, 2)


def held() -> str:
    """What was survived, with numbers."""
    resume, faults = load_results("resume"), load_results("faults")
    lab, lies = load_results("deployment"), load_results("attacks")
    told = {lie: drop["points"] for lie, drop in lies["run"]["drops"].items()}
    worst = max(points for lie, points in told.items() if lie not in lies["run"]["costs"])
    return bullets(
        f"**Resume.** {resume['kills']} kills at random moments, then `heterotune run --resume`: {resume['bit_equal']} "
        "ended with the undisturbed run's bank, bit for bit.",
        f"**Refusals.** {faults['cases']} runs with two hostile clients of ten: {faults['survived']} survived. One "
        f"liar of 12 costs the worst type at most {worst:.1f} points.",
        f"**Kills.** {lab['soak_kills']} deaths in half an hour of a deployment: {lab['soak_lost_rounds']} of "
        f"{lab['soak_rounds']} rounds lost. {lab['refused']} of {lab['refusal_cases']} strangers were kept out.",
    )  # fmt: skip


def measured() -> str:
    """Two genuine families, floor and ceiling, task by task, with one and two clients of each type."""
    known = load_results("headline")
    every = {
        task: [known.get(f"{task}.smollm2_gemma.{each}", {}) for each in _CLIENTS] for task in TASKS
    }
    claims = {task: own for task, own in every.items() if any("ci_low" in claim for claim in own)}
    told = [claim.get("rows", {}) for own in claims.values() for claim in own]
    rows = []
    for row, label in _ROWS.items():
        found = [rows[row] for rows in told if row in rows]
        if not found:
            continue
        cells = [
            ", ".join(number(claim.get("rows", {}).get(row, {}), "accuracy") for claim in own)
            for own in claims.values()
        ]
        sent = [own["bytes_up_in_all"] for own in found if own["bytes_up_in_all"] is not None]
        rows.append([label, *cells, f"{max(sent) / 1e3:,.0f}" if sent else "-"])
    for place, each in enumerate(_CLIENTS):
        gains = [_gain(own[place]) for own in claims.values()]
        rows.append([f"over the best rival, {each} a type", *gains, ""])
    text = (
        "Accuracy in percent: a package's section, of 16, from its description; a noun's WordNet kind, of 24, from its "
        "gloss. Two families (SmolLM2-135M at 4 bits, Gemma-3-270M at 8) with one and, after the comma, two clients "
        f"each: 96 examples per client, 10 rounds, {len(CLAIM_SEEDS)} seeds, tuned on dev texts. `kB up`: a client, "
        "whole run. A dash: not run, like LoRA rivals ([results](docs/results.md)). In brackets: 95 %."
    )
    return f"{said(text)}\n\n{table(('', *claims, 'kB up'), rows)}"


def _gain(claim: Mapping[str, Any]) -> str:
    if "ci_low" not in claim:
        return "-"
    return (
        f"{claim['gain_over_best_rival']:+.1f} ({claim['ci_low']:+.1f} .. {claim['ci_high']:+.1f})"
    )


_PARTS = {"held": held, "measured": measured}


def text() -> str:
    """The whole README, its numbers as the result files have them."""
    return _PART.sub(lambda found: f"{found[1]}{_PARTS[found[2]]()}\n{found[3]}", PATH.read_text())
