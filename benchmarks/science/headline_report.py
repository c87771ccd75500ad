"""The headline's cells as JSON, Markdown and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from scipy import stats

from benchmarks.runner import (
    RESULTS,
    Key,
    mean_and_std,
    paired_gain,
    read_results,
    seed_means,
)
from heterotune_flwr.exchange.storage import atomic_write_text

#: Ours: the first of these that is measured on a suite.
OURS = (
    "heterotune_deep",
    "heterotune_without_discriminant",
    "heterotune_deep_cold",
    "heterotune",
    "heterotune_plain",
)
#: Parts of ours are ablations, not rivals: the bank alone, without CMGA, the predictions alone, LoRA at home.
NO_RIVALS = (*OURS, "heterotune_focused", "bank", "mean", "predictions", "lora_at_home")


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
    many = len(gains) > 1
    width = (
        stats.t.ppf(0.975, len(gains) - 1) * spread / len(gains) ** 0.5 if many else float("inf")
    )
    return {"gain": mean, "half_width": round(float(width), 3)}


def of_type(accuracy: dict[Key, float], model_type: str) -> dict[Key, float]:
    """The clients of one type."""
    return {key: value for key, value in accuracy.items() if key[1] == model_type}


def gains_by_type(
    ours: dict[Key, float], rivals: dict[str, dict[Key, float]], best: str
) -> dict[str, Any]:
    """Per type: the gain over the best rival of all types together, and over the best one *of that type*."""
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


def ours_of(measured: Collection[str]) -> str | None:
    """Which row of a suite is ours."""
    return next((name for name in OURS if name in measured), None)


def peak_ratio(methods: dict[str, Any], bank_alone: bool) -> dict[str, Any]:
    """Peak memory against LoRA: of a step where the bank trains alone, else of a whole simulation worker."""
    if bank_alone:
        memory = read_results("memory")
        ratios = [memory[name] for name in memory if name.startswith("peak_ratio.")]
        of = "a training step on SmolLM2-135M against LoRA r=32 on queries and values, worst of all bits"
        return {"peak_ratio": max(ratios, default=None), "peak_ratio_of": of}
    names = (ours_of(methods), "fedit")
    peaks = [methods[name]["peak_memory_mb"] for name in names if name in methods]
    measured = len(peaks) == 2 and all(peaks)
    of = "a simulation worker, libraries and all backbones included, against FedIT's"
    return {"peak_ratio": round(peaks[0] / peaks[1], 3) if measured else None, "peak_ratio_of": of}


def suite_values(methods: dict[str, Any], bank_alone: bool) -> dict[str, Any]:
    """The flat keys of one suite; ``bank_alone``: no LoRA trains beside the bank there."""
    measured = {name: entry for name, entry in methods.items() if "cells" in entry}
    values: dict[str, Any] = {"methods": {name: summary(entry) for name, entry in measured.items()}}
    values["refused"] = {n: e["refused"] for n, e in methods.items() if "refused" in e}
    own = ours_of(measured)
    if own is None:
        return values
    ours = accuracies(measured[own])
    gains = {
        name: paired_gain(ours, accuracies(entry))
        for name, entry in measured.items()
        if name != own
    }
    values |= {"ours": own, "gains": gains}
    rivals = {name: values["methods"][name]["global"] for name in measured if name not in NO_RIVALS}
    if rivals:
        best = max(rivals, key=lambda name: rivals[name])
        values |= {
            "best_rival": best,
            "gain_over_best_rival": gains[best]["gain"],
            "ci_low": gains[best]["low"],
            "ci_high": gains[best]["high"],
            "gain_by_seed": gain_by_seed(ours, accuracies(measured[best])),
            "gain_by_type": gains_by_type(
                ours, {name: accuracies(measured[name]) for name in rivals}, best
            ),
        }
    if own == "heterotune" and "heterotune_plain" in measured:
        # Class sums leave a real node only where its owner has written yes.
        values["as_a_real_node_ships"] = values["methods"]["heterotune_plain"]["global"]
    if "within_type" in gains:
        values["gain_over_within_type"] = gains["within_type"]["gain"]
        values["gain_over_within_type_ci"] = [
            gains["within_type"]["low"],
            gains["within_type"]["high"],
        ]
    percent = values["methods"][own]["percent_of_lora16"]
    values["percent_fewer_bytes_than_lora16"] = round(100 - percent, 3)
    values |= peak_ratio(values["methods"], bank_alone)
    return values


def markdown(suites: dict[str, Any]) -> str:
    """One table per suite."""
    lines = [
        "# Headline",
        "",
        "Written by `python -m benchmarks.science.headline`. Accuracy in percent; gain: ours (the first measured of "
        f"{', '.join(f'`{name}`' for name in OURS)}) minus the row, paired, 95 % bootstrap over (seed, type) cells; "
        "kB: up, per client-round.",
        "",
    ]
    head = "method | rate | global | own tests | worst 10 % | min | gain | kB | % of LoRA r=16 | s"
    for name, values in suites.items():
        lines += [f"## {name}", "", f"| {head} |", "|---" * 10 + "|"]
        ordered = sorted(values["methods"].items(), key=lambda item: -item[1]["global"])
        for method, row in ordered:
            gain = values.get("gains", {}).get(method)
            shown = ""
            if gain:
                shown = f"{gain['gain']:+.1f} ({gain['low']:+.1f} .. {gain['high']:+.1f})"
            cells = [
                method, f"{row['rate']:g}", f"{row['global']:.1f} ± {row['std']:.1f}", f"{row['personal']:.1f}",
                f"{row['worst_tenth']:.1f}", f"{row['min']:.1f}", shown, f"{row['bytes_up'] / 1e3:.1f}",
                f"{row['percent_of_lora16']:.2f}", f"{row['seconds']:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"| {method} | refused: {why} |" for method, why in values["refused"].items()]
        lines += ["", *by_seed_and_type(values), ""]
    return "\n".join(lines)


def by_seed_and_type(values: dict[str, Any]) -> list[str]:
    """The gain over the best rival with seeds alone drawn anew, and per type."""
    if "gain_by_seed" not in values:
        return []

    def told(gain: dict[str, float]) -> str:
        return f"{gain['gain']:+.1f} ± {gain['half_width']:.1f}"

    own, best = values["ours"], values["best_rival"]
    lines = [f"{own} over {best}, 95 % over seeds alone: {told(values['gain_by_seed'])}."]
    if "as_a_real_node_ships" in values:
        lines.append(
            f"With class sums off, as on a real node: {values['as_a_real_node_ships']:.1f}."
        )
    lines += [
        "",
        f"| type | {own} | over {best} | best rival of that type | over it |",
        "|---" * 5 + "|",
    ]
    for name, row in values["gain_by_type"].items():
        cells = [name, f"{row['ours']:.1f}", told(row["over_best_rival"]), row["best_rival_of_type"],
                 told(row["over_best_rival_of_type"])]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(suites: dict[str, Any]) -> str:
    """Accuracy against bytes up per client-round, one panel per suite, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "headline"  # else equal results give another file
    from matplotlib import pyplot

    shown = {name: values for name, values in suites.items() if values["methods"]}
    figure, axes = pyplot.subplots(
        1, max(1, len(shown)), figsize=(4.5 * max(1, len(shown)), 3.6), squeeze=False
    )
    for axis, (name, values) in zip(axes[0], shown.items(), strict=False):
        for method, row in values["methods"].items():
            x, y = max(row["bytes_up"], 100) / 1e3, row["global"]
            axis.errorbar(x, y, yerr=row["std"], fmt="o", color="C3" if method in OURS else "C0")
            axis.annotate(method, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xscale="log", xlabel="kB up per client-round", ylabel="accuracy (%)", title=name)
    figure.tight_layout()
    path = RESULTS / "headline.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return str(path)


def write_report(found: dict[str, Any], seeds: Sequence[int], bank_alone: Collection[str]) -> None:
    """Write ``headline.json``, ``.md`` and ``.svg``; ``bank_alone``: suites that train nothing else."""
    suites = {name: suite_values(methods, name in bank_alone) for name, methods in found.items()}
    suites = {name: values for name, values in suites.items() if values["methods"]}
    if not suites:
        return
    # Of the cells: the machine that writes the tables need not have measured them.
    measured = (entry for methods in found.values() for entry in methods.values())
    cells = (cell for entry in measured for cell in entry.get("cells", {}).values())
    machines = "; ".join(sorted({cell["machine"] for cell in cells}))
    head = {
        "command": "python -m benchmarks.science.headline",
        "machine": machines,
        "seeds": list(seeds),
    }
    atomic_write_text(RESULTS / "headline.json", json.dumps({**head, **suites}, indent=2) + "\n")
    atomic_write_text(RESULTS / "headline.md", markdown(suites))
    plot(suites)
