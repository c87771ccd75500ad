"""What ``results.json`` of a run says, in numbers: means, paired gains, which measures were taken."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import FederationError
from heterotune_flwr.jsons import as_mapping, parse_json
from heterotune_flwr.protocol.metrics import MODEL_TITLES, TESTS

#: What a measure is called in a title.
MEASURE_TITLES = {"accuracy": "Accuracy", "exact_match": "Exact match", "rouge_l": "ROUGE-L"}
OVERALL = "all clients"
#: Mean, and standard deviation over seeds.
Spread = tuple[float, float]


def load_results(directory: Path) -> dict[str, Any]:
    """``results.json`` of a run directory (FederationError: there are none (yet), or not in its form)."""
    path = directory / "results.json"
    try:
        results: dict[str, Any] = parse_json(path.read_text())
    except FileNotFoundError as error:
        if not (directory / "rounds.jsonl").exists():
            raise FederationError(f"{directory} is no run directory: no results.json") from error
        raise FederationError(
            f"{directory} holds a run without results yet; heterotune status shows where it stands, "
            f"heterotune run --resume {shlex.quote(str(directory))} goes on if it was stopped"
        ) from error
    except (OSError, ValueError) as error:
        raise FederationError(f"{directory} has no readable results.json ({error})") from error
    if not isinstance(results, dict) or not isinstance(results.get("runs"), list):
        raise FederationError(f"{path} is not what a run writes: it has no list of runs")
    return results


def strategies_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the strategies, in the order in which they ran."""
    return list(dict.fromkeys(run["strategy"] for run in results["runs"]))


def types_of(results: Mapping[str, Any]) -> list[str]:
    """Model types, sorted."""
    return sorted({client["type"] for run in results["runs"] for client in run["clients"]})


def guest_types(results: Mapping[str, Any]) -> set[str]:
    """Types none of whose clients has examples to train on."""
    clients = [client for run in results["runs"] for client in run["clients"]]
    return {c["type"] for c in clients} - {c["type"] for c in clients if c.get("examples", 1)}


def subject_of(strategies: Sequence[str]) -> str:
    """Return the strategy whose gains over the others are shown: HeteroTune, else the last."""
    return "heterotune" if "heterotune" in strategies else strategies[-1]


def has_measure(results: Mapping[str, Any], metric: str) -> bool:
    """Whether any client was measured that way."""
    return any(c.get(metric) is not None for run in results["runs"] for c in run["clients"])


def measures_taken(results: Mapping[str, Any], personal: bool = True) -> list[str]:
    """Measures in percent that a table is worth: accuracy, or of answers that were generated how like the right ones.

    The accuracy of a generated answer is that of all its tokens at once, which says little.
    """
    scopes = TESTS if personal else ("global",)
    generated = any(has_measure(results, f"{scope}_rouge_l") for scope in TESTS)
    measures = ("rouge_l", "exact_match") if generated else ("accuracy", "exact_match")
    names = [f"{scope}_{measure}" for measure in measures for scope in scopes]
    return [name for name in names if name == "global_accuracy" or has_measure(results, name)]


def _by_client(
    results: Mapping[str, Any], strategy: str, type_key: str, metric: str
) -> dict[int, dict[str, float]]:
    """Seed -> client -> its measure in percent, of those that have one."""
    return {
        run["seed"]: {
            client["client_id"]: 100 * client[metric]
            for client in run["clients"]
            if client[metric] is not None and type_key in (OVERALL, client["type"])
        }
        for run in results["runs"]
        if run["strategy"] == strategy
    }


def _spread(means: Sequence[float]) -> Spread | None:
    if not means:
        return None
    return statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0


def mean_accuracy(
    results: Mapping[str, Any],
    strategy: str,
    type_key: str = OVERALL,
    metric: str = "global_accuracy",
) -> Spread | None:
    """(mean over clients and seeds, standard deviation over seeds) in percent; None without data."""
    seeds = _by_client(results, strategy, type_key, metric).values()
    return _spread([statistics.fmean(row.values()) for row in seeds if row])


def class_of(strategies: Any, strategy: str) -> str:
    """Name of a strategy's class, by a configuration's ``strategies``; else of what its own name stands for."""
    spec = as_mapping(as_mapping(strategies).get(strategy))
    component = str(spec.get("_component_") or "").rpartition(".")[2]
    return component or {"local_only": "LocalOnly", "within_type": "WithinType"}.get(strategy, "")


def shares_nothing(strategies: Any, strategy: str) -> bool:
    """Whether a strategy trains every model alone, by a configuration's ``strategies``."""
    return class_of(strategies, strategy) == "LocalOnly"


def configured(results: Mapping[str, Any]) -> Any:
    """The ``strategies`` of the configuration that results were made by."""
    return as_mapping(results.get("config")).get("strategies")


def taken(counts: Mapping[str, int], alone: bool = False) -> str:
    """``{"bare": 2, "alone": 0, "federated": 10}`` -> ``federated 10, untouched 2``.

    ``alone``: the strategy shares nothing, and what it counts as federated is a model trained alone.
    """
    if alone:
        both = counts.get("alone", 0) + counts.get("federated", 0)
        counts = {**counts, "alone": both, "federated": 0}
    some = sorted((name for name in MODEL_TITLES if counts.get(name)), key=lambda n: -counts[n])
    return ", ".join(f"{MODEL_TITLES[name]} {counts[name]}" for name in some)


def kept_measure(results: Mapping[str, Any]) -> str | None:
    """The measure by which what clients took home is shown: ROUGE-L where answers were generated, else accuracy."""
    own = [run["kept"]["own_tests"]["taken"] for run in results["runs"] if run.get("kept")]
    return next((m for m in ("rouge_l", "accuracy") if any(m in means for means in own)), None)


def kept_means(
    results: Mapping[str, Any], strategy: str, measure: str
) -> tuple[dict[str, Spread | None], dict[str, int]]:
    """Means on own tests of a strategy's models, ``taken`` among them (percent), and how many clients took what.

    Of a strategy that shares nothing the trained model is the lone one, and none is federated.
    """
    kept = [
        run["kept"] for run in results["runs"] if run["strategy"] == strategy and run.get("kept")
    ]
    means = {
        name: _spread(
            [
                100 * k["own_tests"][name][measure]
                for k in kept
                if measure in k["own_tests"].get(name, {})
            ]
        )
        for name in (*MODEL_TITLES, "taken")
    }
    if shares_nothing(configured(results), strategy):
        means |= {"alone": means["federated"], "federated": None}
    return means, {name: sum(k["took"][name] for k in kept) for name in MODEL_TITLES}


def paired_gain(
    results: Mapping[str, Any],
    strategy: str,
    rival: str,
    type_key: str = OVERALL,
    metric: str = "global_accuracy",
) -> Spread | None:
    """(mean gain in points, its standard deviation over seeds), paired by seed and client.

    Only clients that both strategies measured in a seed count; None without any.
    """
    ours, theirs = (_by_client(results, name, type_key, metric) for name in (strategy, rival))
    gains = []
    for seed in ours.keys() & theirs.keys():
        common = ours[seed].keys() & theirs[seed].keys()
        if common:
            gains.append(statistics.fmean(ours[seed][c] - theirs[seed][c] for c in sorted(common)))
    return _spread(gains)
