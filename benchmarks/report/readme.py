"""The README's numbers: what stands between its markers, as the result files have it."""

from __future__ import annotations

import re
import statistics

from benchmarks.report.headline import suites_of, told_seed
from benchmarks.report.real import REAL
from benchmarks.report.sections import bullets, load_results, said, table
from benchmarks.runner import ROOT

PATH = ROOT / "README.md"
_PART = re.compile(r"(<!-- (\w+): made by [^>]*-->\n).*?(<!-- end -->)", flags=re.S)
#: Floor first, ceiling last; a row that was run nowhere is left out.
_ROWS = {
    "local_only": "trained alone",
    "fedit": "FedIT (LoRA, inside a type)",
    "fedmkt": "FedMKT-style",
    "within_type": "bank shared inside a type",
    "within_discriminant": "HeteroTune inside types",
    "heterotune_plain": "HeteroTune, no class sums",
    "heterotune": "**HeteroTune**",
    "pooled": "all data in one place",
}
#: Types of the suites, as the file of guests names them.
_BARE = ("smollm2@nf4", "gemma3-270m@int8", "smollm2-pruned")


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
    """Real families, all rows that were run, floor and ceiling."""
    every = suites_of()
    suites = {name: every[name] for name in REAL}
    bare = load_results("zero_shot")["real_mixed"]
    counts = [2, 2, 3, 3]
    floor = [
        f"{statistics.fmean(bare[kind]['bare'] for kind in _BARE[:count]):.1f}" for count in counts
    ]
    rows: list[list[str]] = [["untouched", *floor, "0"]]
    for method, label in _ROWS.items():
        found = [values["methods"].get(method) for values in suites.values()]
        if any(found):
            up = max(row["bytes_up"] for row in found if row)
            cells = [f"{row['global']:.1f}" if row else "-" for row in found]
            rows.append([label, *cells, f"{up / 1e3:,.1f}"])
    gains = [told_seed(values["gain_by_seed"]) for values in suites.values()]
    rows.append(["over the best rival or control", *gains, ""])
    known = {name for values in suites.values() for name in values["methods"]}
    ceiling = "" if "pooled" in known else " The ceiling, all data in one place, is not measured."
    text = (
        "Accuracy in percent, 16 classes of package descriptions, 96 skewed examples per client, 10 rounds, 3 seeds. "
        "`2 x 1`: two families (SmolLM2-135M at 4 bits, Gemma-3-270M at 8), one client each; of three, a pruned "
        "SmolLM2 is the third. `kB up`: a client and round. A dash: not run. ±: 95 %."
    )
    head = ("", "2 x 1", "2 x 2", "3 x 1", "3 x 2", "kB up")
    return f"{said(text + ceiling)}\n\n{table(head, rows)}"


_PARTS = {"held": held, "measured": measured}


def text() -> str:
    """The whole README, its numbers as the result files have them."""
    return _PART.sub(lambda found: f"{found[1]}{_PARTS[found[2]]()}\n{found[3]}", PATH.read_text())
