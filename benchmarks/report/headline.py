"""The headline's cells as JSON, Markdown and a figure."""

from __future__ import annotations

import json
import statistics
from typing import Any

from scipy import stats

from benchmarks.runner import (
    RESULTS,
    SEEDS,
    Key,
    load_results,
    mean_and_std,
    paired_gain,
    read_results,
    results_file,
    seed_means,
    table,
    told_gain,
)
from heterotune_flwr.exchange.storage import atomic_write_text

COMMAND = "python -m benchmarks.science.headline"
#: Ours: the first of these that is measured on a suite.
OURS = (
    "heterotune_lora", "heterotune_without_discriminant", "heterotune_lora_cold", "heterotune", "heterotune_plain",
)  # fmt: skip
#: Parts of ours are ablations, not rivals: the bank alone, without CMGA, the predictions alone, LoRA at home.
NO_RIVALS = (*OURS, "bank", "mean", "predictions", "lora_at_home")


def accuracies(entry: dict[str, Any], field: str = "global_accuracy") -> dict[Key, float]:
    """(seed, type, client) -> percent; slices (``type x1/2``) count as their parent's type, to pair with others."""
    return {
        (int(seed), row["type"].partition(" x")[0], row["client_id"]): 100 * row[field]
        for seed, cell in entry["cells"].items()
        for row in cell["clients"]
    }


def summary(entry: dict[str, Any]) -> dict[str, Any]:
    """One method on one suite: mean and spread over seeds, worst clients, per type, bytes, memory, time."""
    found = accuracies(entry)
    ordered = sorted(found.values())
    mean, std = mean_and_std(seed_means(found))
    counts = [cell["bytes"] for cell in entry["cells"].values()]
    up = statistics.fmean(count["up_per_client_round"] for count in counts)
    personal = [v for v in accuracies(entry, "personal_accuracy").values() if v is not None]
    types = sorted({key[1] for key in found})
    return {
        "rate": entry["rate"],
        "sweep": entry["sweep"],
        "global": mean,
        "std": std,
        "by_seed": [round(value, 2) for value in seed_means(found)],
        "personal": round(statistics.fmean(personal), 2),
        "worst_tenth": round(statistics.fmean(ordered[: max(1, len(ordered) // 10)]), 2),
        "min": round(ordered[0], 2),
        "types": {t: round(statistics.fmean(v for k, v in found.items() if k[1] == t), 2) for t in types},
        "bytes_up": round(up),
        "bytes_down": round(statistics.fmean(count["down_per_client_round"] for count in counts)),
        "bytes_one_time_up": round(statistics.fmean(count["one_time_up"] for count in counts)),
        "percent_of_lora16": round(100 * up / counts[0]["lora16_bytes"], 3),
        "percent_of_model": round(100 * up / counts[0]["model_bytes"], 4),
        "peak_memory_mb": round(max(c["peak_memory_mb"] or 0 for c in entry["cells"].values()), 1),
        "seconds": round(statistics.fmean(cell["seconds"] for cell in entry["cells"].values()), 1),
    }  # fmt: skip


def gain_by_seed(ours: dict[Key, float], other: dict[Key, float]) -> dict[str, float]:
    """Mean gain of the seeds with the half width of its 95 % Student interval: seeds alone are drawn anew.

    Wider than the bootstrap over (seed, type) cells, which takes a seed's types for independent.
    """
    gains = [a - b for a, b in zip(seed_means(ours), seed_means(other), strict=True)]
    mean, spread = mean_and_std(gains)
    width = stats.t.ppf(0.975, len(gains) - 1) * spread / len(gains) ** 0.5
    return {"gain": mean, "half_width": round(float(width), 3)}


def gains_by_type(
    ours: dict[Key, float], rivals: dict[str, dict[Key, float]], best: str
) -> dict[str, Any]:
    """Per type: the gain over the best rival of all types together, and over the best one *of that type*."""

    def of_type(accuracy: dict[Key, float], model_type: str) -> dict[Key, float]:
        return {key: value for key, value in accuracy.items() if key[1] == model_type}

    found: dict[str, Any] = {}
    for model_type in sorted({key[1] for key in ours}):
        own = of_type(ours, model_type)
        there = {name: of_type(values, model_type) for name, values in rivals.items()}
        strongest = max(there, key=lambda name: statistics.fmean(there[name].values()))
        found[model_type] = {
            "ours": round(statistics.fmean(own.values()), 2),
            "over_best_rival": gain_by_seed(own, there[best]),
            "best_rival_of_type": strongest,
            "over_best_rival_of_type": gain_by_seed(own, there[strongest]),
        }
    return found


def peak_ratio(methods: dict[str, Any], own: str, bank_alone: bool) -> dict[str, Any]:
    """Peak memory against LoRA: of a step where the bank trains alone, else of a whole simulation worker."""
    if bank_alone:
        memory = read_results("memory")
        ratios = [memory[name] for name in memory if name.startswith("peak_ratio.")]
        of = "a training step on SmolLM2-135M against LoRA r=32 on queries and values, worst of all bits"
        return {"peak_ratio": max(ratios, default=None), "peak_ratio_of": of}
    peaks = [methods[name]["peak_memory_mb"] for name in (own, "fedit") if name in methods]
    measured = len(peaks) == 2 and all(peaks)
    of = "a simulation worker, libraries and all backbones included, against FedIT's"
    return {"peak_ratio": round(peaks[0] / peaks[1], 3) if measured else None, "peak_ratio_of": of}


def suite_values(methods: dict[str, Any], bank_alone: bool) -> dict[str, Any]:
    """The flat keys of one suite; ``bank_alone``: no LoRA trains beside the bank there."""
    measured = {name: entry for name, entry in methods.items() if "cells" in entry}
    rows = {name: summary(entry) for name, entry in measured.items()}
    refused = {n: e["refused"] for n, e in methods.items() if "refused" in e}
    values: dict[str, Any] = {"methods": rows, "refused": refused}
    own = next((name for name in OURS if name in measured), None)
    if own is None:
        return values
    found = {name: accuracies(entry) for name, entry in measured.items()}
    ours = found[own]
    gains = {name: paired_gain(ours, found[name]) for name in measured if name != own}
    values |= {"ours": own, "gains": gains}
    rivals = {name: found[name] for name in measured if name not in NO_RIVALS}
    if rivals:
        best = max(rivals, key=lambda name: rows[name]["global"])
        values |= {
            "best_rival": best,
            "gain_over_best_rival": gains[best]["gain"],
            "ci_low": gains[best]["low"],
            "ci_high": gains[best]["high"],
            "gain_by_seed": gain_by_seed(ours, rivals[best]),
            "gain_by_type": gains_by_type(ours, rivals, best),
        }
    if own == "heterotune" and "heterotune_plain" in rows:
        # Class sums leave a real node only where its owner has written yes.
        values["as_a_real_node_ships"] = rows["heterotune_plain"]["global"]
    if within := gains.get("within_type"):
        values["gain_over_within_type"] = within["gain"]
        values["gain_over_within_type_ci"] = [within["low"], within["high"]]
    fewer = round(100 - rows[own]["percent_of_lora16"], 3)
    return values | {"percent_fewer_bytes_than_lora16": fewer} | peak_ratio(rows, own, bank_alone)


def write() -> dict[str, Any]:
    """Write ``headline.json`` from the cells; returns the earlier suites (claims: :mod:`.claims`)."""
    from benchmarks.report import claims
    from benchmarks.science.headline import table as measured
    from benchmarks.science.headline_suites import SUITES

    found = measured()
    suites = {
        name: suite_values(methods, not SUITES[name].with_lora) for name, methods in found.items()
    }
    suites = {name: values for name, values in suites.items() if values["methods"]}
    # Of the cells: the machine that writes the tables need not have measured them.
    entries = [entry for methods in found.values() for entry in methods.values()]
    cells = [cell for entry in entries for cell in entry.get("cells", {}).values()]
    machines = "; ".join(sorted({cell["machine"] for cell in cells}))
    head = {"command": COMMAND, "machine": machines, "seeds": list(SEEDS)}
    text = json.dumps({**head, **suites, **claims.values()}, indent=1) + "\n"
    atomic_write_text(results_file("headline"), text)
    return suites


def suites_of() -> dict[str, Any]:
    """The earlier suites as they were last written."""
    known = load_results("headline")
    return {name: values for name, values in known.items() if "methods" in values}


def told_seed(gain: dict[str, float]) -> str:
    """A gain with its half width over seeds."""
    return f"{gain['gain']:+.1f} ± {gain['half_width']:.1f}"


def all_rows(values: dict[str, Any]) -> str:
    """Every method of a suite, the best first."""
    rows = []
    for method, row in sorted(values["methods"].items(), key=lambda item: -item[1]["global"]):
        gain = values.get("gains", {}).get(method)
        rows.append((
            f"{method} ({row['rate']:g})", f"{row['global']:.1f} ± {row['std']:.1f}",
            f"{row['personal']:.1f}, {row['worst_tenth']:.1f}", told_gain(gain) if gain else "",
            f"{row['bytes_up'] / 1e3:.1f} ({row['percent_of_lora16']:.2f} %)", f"{row['seconds']:.0f}",
        ))  # fmt: skip
    head = (
        "method (rate)",
        "accuracy",
        "own tests, worst tenth",
        "ours over it",
        "kB up (of LoRA r=16)",
        "s",
    )
    return table(head, rows)  # fmt: skip


def markdown(suites: dict[str, Any]) -> str:
    """Every row of every suite."""
    lines = [
        "# Every row of the headline", "",
        f"Made by `python -m benchmarks.report` from what `{COMMAND}` measured. Accuracy in percent on the global",
        "test, mean over clients and its spread over seeds. `ours over it`: paired, 95 % bootstrap over (seed, type)",
        "cells. kB: up, per client-round. What the suites and rows are: `benchmarks/science/headline.py`.",
    ]  # fmt: skip
    for name, values in suites.items():
        lines += ["", f"## {name}", "", all_rows(values), ""]
        lines += [f"* `{method}` refused: {why}" for method, why in values["refused"].items()]
        if "gain_by_type" in values:
            lines += ["", by_type(values)]
    return "\n".join(lines) + "\n"


def by_type(values: dict[str, Any]) -> str:
    """The gain over the best rival of all, and of each type, with seeds alone drawn anew."""
    own, best = values["ours"], values["best_rival"]
    rows = [
        (name, f"{row['ours']:.1f}", told_seed(row["over_best_rival"]), row["best_rival_of_type"],
         told_seed(row["over_best_rival_of_type"]))
        for name, row in values["gain_by_type"].items()
    ]  # fmt: skip
    return table(("type", own, f"over {best}", "best rival of that type", "over it"), rows)


def plot(suites: dict[str, Any]) -> None:
    """Accuracy against bytes up per client-round, one panel per suite, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "headline"  # else equal results give another file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(suites), figsize=(4.5 * len(suites), 3.6), squeeze=False)
    for axis, (name, values) in zip(axes[0], suites.items(), strict=True):
        for method, row in values["methods"].items():
            x, y = max(row["bytes_up"], 100) / 1e3, row["global"]
            axis.errorbar(x, y, yerr=row["std"], fmt="o", color="C3" if method in OURS else "C0")
            axis.annotate(method, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="kB up per client-round", ylabel="accuracy (%)", title=name)
    figure.tight_layout()
    figure.savefig(RESULTS / "headline.svg", metadata={"Date": None})
    pyplot.close(figure)
