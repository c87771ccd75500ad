"""From cells to the table of the experiment on answers: losses, differences, shares of the gap, who is below bare."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.science.intervals import two_way_interval

BARE, FLOOR, CEILING = "bare", "within type", "pooled data"
#: The row that the suite's own figures are about: what ships on open text.
METHOD = "top-8, bare answers, and bank"
#: Rows whose answers are compared with the method's: what can run with different models and is not it.
RIVALS = (FLOOR, "top-8, bare answers")
#: A gap below this, or below two standard errors, is told as a difference, without a share.
LEAST_GAP = 0.05
#: Rows of the plan that this command does not run: each trains through the whole model.
NOT_RUN = (
    "FedIT within type", "FedMKT", "pooled data by LoRA",
)  # fmt: skip
_DRAWS = 2000
_LEVEL = 0.05
Cell = Mapping[str, Any]


def chosen(cells: Mapping[str, Cell], suite: str, clients: int, row: str) -> tuple[float, int]:
    """Rate and rounds of a row: least mean loss on the dev texts of all tasks."""
    start = f"dev {suite} {clients} {row} "
    found = {
        (float(name.removeprefix(start)), int(rounds)): _mean([client["all"] for client in told])
        for name, cell in cells.items()
        if name.startswith(start) and _is_rate(name.removeprefix(start))
        for rounds, told in cell.items()
        if rounds.isdigit()
    }
    if not found:
        raise SystemExit(
            f"{suite}, {clients} clients per type: no rate of {row!r} was tried on dev"
        )
    return min(found, key=lambda key: found[key])


def rates_tried(cells: Mapping[str, Cell], start: str) -> list[float]:
    """Rates of a row that were tried on dev; ``start``: what their cells' names begin with."""
    rates = [name.removeprefix(start) for name in cells if name.startswith(start)]
    return [float(rate) for rate in rates if _is_rate(rate)]


def _is_rate(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def summary(cells: Mapping[str, Cell], asked: Iterable[str] = ()) -> dict[str, Any]:
    """Per suite and clients per type: its figures, and per partition and row the table."""
    told: dict[tuple[str, str], dict[str, dict[str, dict[int, Cell]]]] = {}
    for name, cell in cells.items():
        if name.startswith(("dev ", "rouge ")) or not cell.get("clients"):
            continue
        suite, clients, partition, seed, row = name.split(" ", 4)
        rows = told.setdefault((suite, clients), {}).setdefault(partition, {})
        rows.setdefault(row, {})[int(seed)] = cell
    found: dict[str, Any] = {}
    for (suite, clients), partitions in sorted(told.items()):
        tables = {partition: _table(rows) for partition, rows in sorted(partitions.items())}
        for partition, table in tables.items():
            for row, by_type in _rouge(cells, f"rouge {suite} {clients} {partition} ").items():
                for kind, entry in by_type.items():
                    table.setdefault(row, {}).setdefault(kind, {}).update(entry)
        written = f"rouge {suite} {clients} "
        found[f"{suite}_{clients}"] = (
            _figures(partitions, tables)
            | _rouge_gain(cells, written)
            | {
                "partitions": tables,
                "choices": {
                    row: [cell["rate"], cell["rounds"]]
                    for rows in partitions.values()
                    for row, by_seed in rows.items()
                    for cell in by_seed.values()
                },
            }
        )
    seeds = sorted(
        {
            seed
            for p in told.values()
            for rows in p.values()
            for own in rows.values()
            for seed in own
        }
    )
    missing = [name for name in asked if not cells.get(name, {}).get("clients")]
    return found | {
        "seeds": seeds,
        "trials_per_row": 6,
        "missing": missing,
        "not_run": list(NOT_RUN),
    }


def _table(rows: Mapping[str, Mapping[int, Cell]]) -> dict[str, Any]:
    types = sorted(
        {c["type"] for own in rows.values() for cell in own.values() for c in cell["clients"]}
    )
    table: dict[str, Any] = {}
    for row, cells in rows.items():
        for kind in types:
            losses = _losses(cells, kind, "all")
            if not losses:
                continue
            floor = _losses(rows.get(FLOOR, {}), kind, "all")
            entry = {
                "loss_all": round(_mean(losses.values()), 4),
                "loss_own": round(_mean(_losses(cells, kind, "own").values()), 4),
                "seeds": len(losses),
                "bare_all": round(_mean(_losses(cells, kind, "all", "bare").values()), 4),
                "bare_own": round(_mean(_losses(cells, kind, "own", "bare").values()), 4),
                **_gain(floor, losses, "gain_all"),
                **_gain(
                    _losses(rows.get(FLOOR, {}), kind, "own"),
                    _losses(cells, kind, "own"),
                    "gain_own",
                ),
                **_share(floor, _losses(rows.get(CEILING, {}), kind, "all"), losses),
            }
            table.setdefault(row, {})[kind] = entry
    return table


def _rouge(cells: Mapping[str, Cell], start: str) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> type -> mean ROUGE-L on all tasks and on own, and of how many answers over all seeds."""
    found: dict[str, dict[str, list[Cell]]] = {}
    for name, cell in cells.items():
        if name.startswith(start):
            row = name.removeprefix(start).split(" ", 1)[1]
            for client in cell["clients"]:
                found.setdefault(row, {}).setdefault(client["type"], []).append(client)
    return {
        row: {
            kind: {
                "rouge_all": round(_mean([c["all"] for c in clients]), 2),
                "rouge_own": round(_mean([c["own"] for c in clients]), 2),
                "answers": sum(c["answers"] for c in clients),
            }
            for kind, clients in by_type.items()
        }
        for row, by_type in found.items()
    }


def _losses(
    cells: Mapping[int, Cell], kind: str, what: str, of: str = "clients"
) -> dict[int, float]:
    """Seed -> mean over a type's clients."""
    found = {
        seed: [client[what] for client in cell[of] if client["type"] == kind]
        for seed, cell in cells.items()
    }
    return {seed: _mean(values) for seed, values in found.items() if values}


def _gain(floor: Mapping[int, float], losses: Mapping[int, float], name: str) -> dict[str, float]:
    """What the loss is lower than inside the type: mean over seeds, and its standard error."""
    gains = [floor[seed] - losses[seed] for seed in sorted(floor.keys() & losses.keys())]
    if not gains:
        return {}
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return {name: round(_mean(gains), 4), f"{name}_se": round(error, 4) if error == error else 0.0}


def _share(
    floor: Mapping[int, float], ceiling: Mapping[int, float], losses: Mapping[int, float]
) -> dict[str, float]:
    """Share of the gap between inside the type and pooled data, with a bootstrap interval over seeds."""
    seeds = sorted(floor.keys() & ceiling.keys() & losses.keys())
    gaps = [floor[seed] - ceiling[seed] for seed in seeds]
    if len(seeds) < 2 or _mean(gaps) < LEAST_GAP:
        return {}
    if _mean(gaps) < 2 * statistics.stdev(gaps) / len(gaps) ** 0.5:
        return {}
    gains = [floor[seed] - losses[seed] for seed in seeds]
    rng = random.Random(0)
    drawn = []
    for _ in range(_DRAWS):
        picked = rng.choices(range(len(seeds)), k=len(seeds))
        drawn.append(sum(gains[i] for i in picked) / max(sum(gaps[i] for i in picked), 1e-9))
    drawn.sort()
    return {
        "share": round(_mean(gains) / _mean(gaps), 3),
        "share_low": round(drawn[int(0.025 * _DRAWS)], 3),
        "share_high": round(drawn[int(0.975 * _DRAWS)], 3),
    }


def _figures(partitions: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The suite's own figures, about :data:`METHOD`."""
    shares = {
        f"{partition} {kind}": entry["share"]
        for partition, table in tables.items()
        for kind, entry in table.get(METHOD, {}).items()
        if "share" in entry
    }
    clients = [
        (c["behind_bare"], c["own_texts"])
        for rows in partitions.values()
        for cell in rows.get(METHOD, {}).values()
        for c in cell["clients"]
    ]
    return {
        "method": METHOD,
        "share_of_gap_loss": round(_mean(shares.values()), 3) if shares else None,
        "share_of_gap_worst_type": min(shares.values()) if shares else None,
        "clients_below_bare": _below([pair for pair, _ in clients]),
        "clients": len(clients),
        "own_texts_least": min((texts for _, texts in clients), default=0),
    }


def _rouge_gain(cells: Mapping[str, Cell], start: str) -> dict[str, Any]:
    """Points of ROUGE-L on all tasks above the best rival, with a 95 % interval over seeds and texts."""
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, cell in cells.items():
        if name.startswith(start):
            partition, seed, row = name.removeprefix(start).split(" ", 2)
            place = f"{partition} {seed}"
            scores.setdefault(row, {})[place] = np.mean([c["scores"] for c in cell["clients"]], 0)
    ours = scores.get(METHOD, {})
    rivals = {r: scores[r] for r in RIVALS if r in scores and scores[r].keys() >= ours.keys()}
    if len(ours) < 2 or not rivals:
        return dict.fromkeys(("rouge_gain_over_best_rival", "ci_low", "ci_high", "best_rival"))
    best = max(rivals, key=lambda row: np.mean([rivals[row][place] for place in ours]))
    gain = two_way_interval(np.stack([ours[place] - rivals[best][place] for place in ours]))
    told = {
        "rouge_gain_over_best_rival": gain["gain"],
        "ci_low": gain["low"],
        "ci_high": gain["high"],
    }
    return {key: round(value, 2) for key, value in told.items()} | {"best_rival": best}


def _below(pairs: Sequence[Sequence[float]]) -> int:
    """Clients whose loss on their own texts is surely above their bare model's (Holm over all of them)."""
    normal = statistics.NormalDist()
    chances = sorted(
        1 - normal.cdf(mean / error) if error else float(mean <= 0) for mean, error in pairs
    )
    for rank, chance in enumerate(chances):
        if chance > _LEVEL / (len(chances) - rank):
            return rank
    return len(chances)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
