"""The headline on the embedded family, through real Flower simulations.

Accuracy of local-only, within-type averaging, FedIT (LoRA mean inside a type), HeteroTune and its bank alone with
1, 2 and 4 clients per type, over several seeds and paired over clients; controls; bytes on the wire;
seconds per client-round against the same optimizer steps in a bare PyTorch loop. Every method learns at its own
best rate: the bank's methods at those the laboratory found on other seeds (``alignment_probe.json``), FedIT at the
best of a sweep on a seed of its own. HeteroTune is without its shared discriminant here (``benchmarks.headline`` has
both: ``bank3`` to ``bank48``).

Run: ``python -m benchmarks.embedded`` (about 80 minutes on 2 cores, half of it FedIT), or a part of it, like
``--tables accuracy overhead``; other parts stay as they are. Writes ``benchmarks/results/embedded.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.bare_loop import bare_seconds_per_client_round
from benchmarks.common import (
    SEEDS,
    client_accuracies,
    flower_run,
    mean_and_std,
    paired_gain,
    read_results,
    seed_means,
    tuned_rates,
    write_results,
)

TABLES = ("accuracy", "overhead", "controls", "fedit")
CONTROLS = ("random_maps", "random_down", "random_up", "rotated_basis")
FEDIT_RATES = (3e-4, 1e-3, 3e-3)
FEDIT_SEED = 9
WORKERS = 2


def overrides(clients: int, seeds: list[int], rates: dict[str, float], types: int = 3) -> list[str]:
    """Overrides of a preset for ``clients`` clients of each of its types; strategies at their ``rates``."""
    strategies = list(rates)
    plain = ["strategies.heterotune.discriminant=null"] if "heterotune" in rates else []
    return [
        *plain,
        *(f"types.{index}.clients={clients}" for index in range(types)),
        *(f"strategies.{name}.train.learning_rate={rate}" for name, rate in rates.items()),
        f"run.seeds={seeds}".replace(" ", ""),
        f"run.compare=[{','.join(strategies)}]",
        "server.rounds=30",
        "server.evaluate_every=0",
    ]


def add_accuracy(table: dict[str, Any], results: dict[str, Any]) -> None:
    """Add mean and spread over seeds of every strategy of a run to a table."""
    for strategy in dict.fromkeys(run["strategy"] for run in results["runs"]):
        means = seed_means(client_accuracies(results, strategy))
        table[strategy], table[f"{strategy}.std"] = mean_and_std(means)
        personal = seed_means(client_accuracies(results, strategy, "personal_accuracy"))
        table[f"{strategy}.personal"] = mean_and_std(personal)[0]


def remember(name: str, values: dict[str, Any], clients: int, results: dict[str, Any]) -> None:
    """Keep every client's accuracy, and HeteroTune's gains over all rivals measured so far (paired)."""
    earlier = read_results(name).get("per_client", {}).get(str(clients), {})
    known = values.setdefault("per_client", {}).setdefault(str(clients), earlier)
    for strategy in dict.fromkeys(run["strategy"] for run in results["runs"]):
        found = client_accuracies(results, strategy)
        known[strategy] = {json.dumps(key): round(value, 3) for key, value in found.items()}
    measured = {
        strategy: {tuple(json.loads(key)): value for key, value in found.items()}
        for strategy, found in known.items()
    }
    for rival in sorted(measured.keys() - {"heterotune"}) if "heterotune" in measured else ():
        gain = paired_gain(measured["heterotune"], measured[rival])
        values["accuracy"][str(clients)][f"gain_over_{rival}"] = gain
    if {"bank", "within_type"} <= measured.keys():
        gain = paired_gain(measured["bank"], measured["within_type"])
        values["accuracy"][str(clients)]["bank_gain_over_within_type"] = gain


def control_row(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracies with a broken alignment and what is left of the bank's gain (predictions need no alignment)."""
    row: dict[str, Any] = {}
    add_accuracy(row, results)
    ours, theirs = (client_accuracies(results, name) for name in ("bank", "within_type"))
    return row | {"gain_over_within_type": paired_gain(ours, theirs)}


def round_seconds(results: dict[str, Any], strategy: str) -> float:
    """Median seconds of a training round in steady state (from the third on), no evaluation inside."""
    times: dict[int, list[float]] = {}
    for line in (Path(results["run_dir"]) / "rounds.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round" and event["strategy"] == strategy:
            times.setdefault(event["seed"], []).append(event["time"])
    gaps = [b - a for stamps in times.values() for a, b in itertools.pairwise(stamps[2:])]
    return statistics.median(gaps)


def add_bytes(values: dict[str, Any], results: dict[str, Any]) -> None:
    """The byte ledger of HeteroTune's first run."""
    counts = next(run["bytes"] for run in results["runs"] if run["strategy"] == "heterotune")
    values["wire_bytes_up"] = round(counts["up_per_client_round"])
    values["wire_bytes_down"] = round(counts["down_per_client_round"])
    values["one_time_bytes_up"] = counts["one_time_up"]
    values["one_time_bytes_down"] = counts["one_time_down"]
    values["lora16_bytes"] = round(counts["lora16_bytes"])
    values["model_bytes"] = round(counts["model_bytes"])


def add_overhead(values: dict[str, Any], results: dict[str, Any], clients: int) -> None:
    """Seconds per client-round through Flower over those of the bare loop."""
    flower = round_seconds(results, "bank") * WORKERS / clients
    kept = bare_seconds_per_client_round("demo", cached=True)
    full = bare_seconds_per_client_round("demo", cached=False)
    values["client_round_seconds"] = {
        "flower": round(flower, 4), "bare_loop_kept_states": round(kept, 4),
        "bare_loop_full_forward": round(full, 4),
    }  # fmt: skip
    values["sim_overhead_ratio"] = round(flower / kept, 2)
    values["sim_overhead_ratio_full_forward"] = round(flower / full, 2)


def accuracy_tables(values: dict[str, Any], seeds: list[int], counts: list[int]) -> None:
    """Local-only, within-type and HeteroTune for every number of clients per type."""
    for clients in counts:
        rates = tuned_rates("tiny", 3, clients)
        cold = ["alignment.cache=false"] if clients == counts[-1] else []
        results = flower_run("demo", [*overrides(clients, seeds, rates), *cold])
        table = values.setdefault("accuracy", {}).setdefault(str(clients), {})
        table["learning_rates"] = {**table.get("learning_rates", {}), **rates}
        add_accuracy(table, results)
        remember("embedded", values, clients, results)
        add_bytes(values, results)
        write_results("embedded", values)


def control_tables(name: str, preset: str, family: str, types: int, values: dict[str, Any]) -> None:
    """What is left of the gain when the alignment is broken on purpose: one client per type."""
    for control in CONTROLS:
        rates = tuned_rates(family, types, 1, f"control {control}")
        pair = {key: rates[key] for key in ("within_type", "bank")}
        words = overrides(1, values["seeds"], pair, types)
        broken = flower_run(preset, [*words, f"alignment.control={control}"])
        values[f"control_{control}"] = {"1": control_row(broken)}
        write_results(name, values)


def fedit_tables(values: dict[str, Any], seeds: list[int], counts: list[int]) -> None:
    """FedIT at the best rate of its own sweep (which is not done twice)."""
    sweep: dict[str, float] = read_results("embedded").get("fedit_sweep", {}).get("accuracy", {})
    for rate in [rate for rate in FEDIT_RATES if str(rate) not in sweep]:
        found = flower_run("demo", overrides(1, [FEDIT_SEED], {"fedit": rate}))
        sweep[str(rate)] = mean_and_std(seed_means(client_accuracies(found, "fedit")))[0]
    best = float(max(sweep, key=lambda rate: sweep[rate]))
    values["fedit_sweep"] = {"seed": FEDIT_SEED, "clients_per_type": 1, "accuracy": sweep}
    write_results("embedded", values)
    for clients in counts:
        results = flower_run("demo", overrides(clients, seeds, {"fedit": best}))
        table = values.setdefault("accuracy", {}).setdefault(str(clients), {})
        table["learning_rates"] = {**table.get("learning_rates", {}), "fedit": best}
        add_accuracy(table, results)
        remember("embedded", values, clients, results)
        write_results("embedded", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4], help="per type")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    values: dict[str, Any] = {"seeds": args.seeds}
    if "accuracy" in args.tables:
        accuracy_tables(values, args.seeds, args.clients)
    if "overhead" in args.tables:
        rates = {"bank": tuned_rates("tiny", 3, 4)["bank"]}
        add_overhead(values, flower_run("demo", overrides(4, [0], rates)), 12)
        write_results("embedded", values)
    if "controls" in args.tables:
        control_tables("embedded", "demo", "tiny", 3, values)
    if "fedit" in args.tables:
        fedit_tables(values, args.seeds, args.clients)


if __name__ == "__main__":
    main()
