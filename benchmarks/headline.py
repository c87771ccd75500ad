"""The headline table: every method that can run, tuned, on the same clients, data, rounds and steps.

Suites: the embedded family with 3, 6, 12 and 48 clients (1, 2, 4, 16 per type; of the 48 a quarter take part in each
round), the same with 3, 6 and 12 clients and public texts of the task's own kind (``near3``, ``near6``, ``near12``:
2,000 unlabelled texts that no client owns instead of 6,000 about other things), three real families with 3 and 6
clients, five types (three widths at mixed bits), three clients of one parent (``parent3``: the one suite on which
sub-model extraction can run); 10 rounds. On the embedded family the bank's methods also train LoRA in every layer (as
``heterotune_deep``), on the real ones the bank alone, whose steps cost milliseconds. Two rows show HeteroTune's
halves: ``bank`` shares the bank in all rounds and no predictions, ``predictions`` shares the bank in the first round
alone and mixes nothing; ``lora_at_home`` shares both, while LoRA never leaves its client. Where LoRA trains,
``heterotune_deep`` is the shipped strategy: a learning rate that sinks over the rounds and rises within each, a longer
type phase, more anchors; ``heterotune`` there is the same without all that, and the rows that end in ``_annealed`` are
its strongest rivals with all of it that they can have. Those that end in ``_cold`` have no warm-up. ``fedmkt64`` is
FedMKT-style transfer with as many anchors as HeteroTune (512 a round, 64 a step; ``fedmkt`` has 256 and 16). Every
method first runs at each of its learning rates with seeds of their own (``Suite.sweep``), then at its best one with
``SEEDS``; where a sweep would take an hour there is a single rate (``Suite.rates``). All cells are kept in
``benchmarks/results/headline_cells.json`` as they are done, so the command goes on where it was stopped (``--again``
forgets the chosen ones first). Methods that refuse a suite (dense changes beside 4-bit weights, slices of models
without a common parent) are listed with why.

Run: ``python -m benchmarks.headline`` (days on 2 cores: LoRA trains through the whole backbone), or a part::

    python -m benchmarks.headline --suites embedded6 --methods heterotune within_type local_only fed_sb

Writes ``benchmarks/results/headline.json``, ``headline.md`` and ``headline.svg`` (``pip install matplotlib`` first).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import RESULTS, SEEDS, flower_run, machine
from benchmarks.headline_report import write_report
from heterotune_flwr.config.compose import compose, conf_root
from heterotune_flwr.config.schema import DataConfig
from heterotune_flwr.data.sources import global_test, training_pool
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.strategies.build import check_strategy

_ANNEALED: Mapping[str, Any] = {"train": {"last_rate": 0.05, "warmup_ratio": 0.5}}
#: The same without warm-up, as measured before there was one.
_COLD: Mapping[str, Any] = {"train": {"last_rate": 0.05, "warmup_ratio": 0.0}}
#: HeteroTune's anchors.
_MORE: Mapping[str, Any] = {"anchors": 768, "pool": 6000, "batch": 64}
#: What a method has here beside its shipped preset.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "predictions": {"type_phase": 0.95, "mixing": 0.0},
    "lora_at_home": {"method": {"core_scope": "client"}},
    "fedmkt64": {"consensus": {"anchors": 512, "pool": 1024, "batch": 64, "confidence": 0.0}},
    "heterotune_deep_cold": _COLD,
    "within_consensus_annealed": {"consensus": {**_MORE, "scope": "type"}, **_ANNEALED},
    "within_consensus_cold": {"consensus": {**_MORE, "scope": "type"}, **_COLD},
    "fedmkt64_annealed": {"consensus": {**_MORE, "confidence": 0.0}, **_ANNEALED},
    "fedmkt64_cold": {"consensus": {**_MORE, "confidence": 0.0}, **_COLD},
    "fedit_annealed": _ANNEALED,
}  # fmt: skip
#: Methods that are a shipped strategy under another name.
SHIPPED_AS: Mapping[str, str] = {
    "predictions": "heterotune",
    "lora_at_home": "heterotune",
    "fedmkt64": "fedmkt",
    "heterotune_deep_cold": "heterotune_deep",
    "within_consensus_annealed": "within_consensus",
    "within_consensus_cold": "within_consensus",
    "fedmkt64_annealed": "fedmkt",
    "fedmkt64_cold": "fedmkt",
    "fedit_annealed": "fedit",
}
#: Rows of the suites on which LoRA trains in every method.
WITH_LORA = (
    "heterotune_deep",
    "heterotune_deep_cold",
    "within_consensus_annealed",
    "within_consensus_cold",
    "fedmkt64_annealed",
    "fedmkt64_cold",
    "fedit_annealed",
)
CELLS = RESULTS / "headline_cells.json"
SWEEP_SEED = 9
#: Public texts of the task's kind in the ``near`` suites (clients draw from the other 3,036).
NEAR_TEXTS = 2000
#: Where a run takes seconds, a rate is chosen on three seeds: one alone chooses by luck.
SWEEP_SEEDS = (7, 8, 9)
_TINY = [("tiny-a", "bf16"), ("tiny-b", "int8"), ("tiny-c", "nf4")]
_REAL = [("smollm2", "nf4"), ("gemma3-270m", "int8"), ("smollm2-pruned", "bf16")]
_FIVE = [*_TINY, ("tiny-b", "nf4"), ("tiny-c", "bf16")]


@dataclass(frozen=True)
class Suite:
    """Clients of some model types on the demonstration task."""

    preset: str
    types: Sequence[tuple[str, str]]
    clients: int
    rounds: int = 10
    method: Sequence[str] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sweep: Sequence[int] = (SWEEP_SEED,)
    near_texts: bool = False

    def rates_of(self, method: str) -> Sequence[float]:
        """Learning rates tried for a method here; a single one is not swept."""
        return self.rates.get(method, RATES[method])

    def compared(
        self, name: str, strategies: Mapping[str, Any], seeds: Sequence[int]
    ) -> dict[str, Any]:
        """The preset of a run of these strategies here."""
        preset: dict[str, Any] = yaml.safe_load((conf_root() / f"{self.preset}.yaml").read_text())
        run = {"name": name, "compare": list(strategies), "seeds": list(seeds)}
        return {**preset, "strategies": dict(strategies), "run": run}

    def overrides(self) -> list[str]:
        """Overrides that make the preset's federation this one."""
        entries = [
            f"{{backbone: {backbone}, bits: {bits}, clients: {self.clients}}}"
            for backbone, bits in self.types
        ]
        return [
            f"types=[{', '.join(entries)}]", "server.evaluate_every=0", f"server.rounds={self.rounds}",
            *self.method, *(near_texts() if self.near_texts else ()),
        ]  # fmt: skip


def near_texts() -> list[str]:
    """Overrides for public texts of the task's own kind: some of its texts, without labels, that no client owns."""
    pool = [asdict(example) for example in training_pool(DataConfig())]
    public = np.random.default_rng(0).permutation(len(pool))[:NEAR_TEXTS].tolist()
    owned = [row for index, row in enumerate(pool) if index not in set(public)]
    folder = Path(tempfile.gettempdir()) / "heterotune-near-texts"
    folder.mkdir(exist_ok=True)
    test = [asdict(example) for example in global_test(DataConfig())]
    anchors = [{"text": pool[index]["text"]} for index in public]
    for name, rows in (("anchors", anchors), ("train", owned), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write_text(folder / f"{name}.jsonl", lines)
    files = [f"data.{name}={folder}/{name}.jsonl" for name in ("train", "test")]
    return [*files, f"alignment.anchors={folder}/anchors.jsonl"]


#: LoRA beside the bank, averaged inside a type; where a step through a real backbone takes seconds, the bank alone.
_DEEP = (
    "method.core_kind=lora", "method.core_rank=16", "method.core_from=0.0", "method.core_scale=2.0",
)  # fmt: skip
_BANK, _LORA = (1e-3, 4e-3), (3e-4, 1e-3)
_BANKED = (
    "heterotune",
    "bank",
    "predictions",
    "mean",
    "within_type",
    "within_consensus",
    "local_only",
    "fedprox",
    "fedadam",
)
#: LoRA and bank together: rates of the former; the best of ``embedded3`` where a sweep would take an hour.
_BOTH = {
    **dict.fromkeys((*_BANKED, "fedmkt64"), (1e-3, 2e-3)),
    **dict.fromkeys(("heterotune_deep", "heterotune_deep_cold"), (4e-3, 8e-3)),
    **dict.fromkeys(("fedmkt64_annealed", "fedmkt64_cold"), (2e-3, 4e-3, 8e-3)),
}
_KNOWN: Mapping[str, Sequence[float]] = {
    **dict.fromkeys(_BANKED, (1e-3,)),
    "heterotune": (2e-3,),
    "fedit": (1e-3,),
    "fedmkt": (1e-3,),
    "fedmkt64": (1e-3,),
    "within_consensus": (2e-3,),  # of embedded6
}
#: The rivals inside a type, who may want another rate where they are more.
_BOTH_RIVALS = {
    **_KNOWN,
    **dict.fromkeys(("within_type", "within_consensus", "fedit"), (1e-3, 2e-3)),
}
_SLOW: Mapping[str, Sequence[float]] = {
    **dict.fromkeys(_BANKED, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)), "fedit": (1e-3,), "fedmkt": (1e-3,),
    "fedmkt64": (1e-3,),
}  # fmt: skip
#: Where HeteroTune has its shipped rate, FedMKT may want another than on far texts.
_NEAR: Mapping[str, Sequence[float]] = {
    **_KNOWN, "heterotune_deep": (8e-3,), "fedmkt64_annealed": (4e-3, 8e-3)
}  # fmt: skip
#: Of 48 clients a quarter take part in each round.
_QUARTER = "server.participation=0.25"
SUITES = {
    "embedded3": Suite("demo", _TINY, 1, method=_DEEP, rates=_BOTH),
    "embedded6": Suite("demo", _TINY, 2, method=_DEEP, rates=_BOTH_RIVALS),
    "embedded12": Suite("demo", _TINY, 4, method=_DEEP, rates=_KNOWN),
    "embedded48": Suite("demo", _TINY, 16, method=(*_DEEP, _QUARTER), rates=_KNOWN),
    "real3": Suite("real", _REAL, 1, rates=_SLOW, sweep=SWEEP_SEEDS),
    "real3x2": Suite("real", _REAL, 2, rates=_SLOW, sweep=SWEEP_SEEDS),
    "types5": Suite("demo", _FIVE, 2, method=_DEEP, rates=_KNOWN),
    "near3": Suite("demo", _TINY, 1, method=_DEEP, rates=_NEAR, near_texts=True),
    "near6": Suite("demo", _TINY, 2, method=_DEEP, rates=_NEAR, near_texts=True),
    "near12": Suite("demo", _TINY, 4, method=_DEEP, rates=_NEAR, near_texts=True),
    "parent3": Suite("demo", [("tiny-c", "bf16")], 3, method=_DEEP, rates=_KNOWN),
}
#: Learning rates tried for every method.
RATES: dict[str, Sequence[float]] = {
    **dict.fromkeys(_BANKED, _BANK),
    "lora_at_home": (2e-3,),  # HeteroTune's best where LoRA trains
    # of 4 and 8e-3 on embedded12's tuning seed, without warm-up
    **dict.fromkeys(("heterotune_deep", "heterotune_deep_cold"), (8e-3,)),
    **dict.fromkeys(("within_consensus_annealed", "within_consensus_cold"), (8e-3,)),
    **dict.fromkeys(("fedmkt64_annealed", "fedmkt64_cold"), (2e-3, 4e-3)),
    "fedit_annealed": (1e-3, 2e-3, 4e-3),
    **dict.fromkeys(
        (
            "fedit",
            "fedmkt",
            "fedmkt64",
            "ffa_lora",
            "rolora",
            "hetlora",
            "flexlora",
            "fedex_lora",
            "flora",
        ),
        _LORA,
    ),
    "co_lora": (1e-3, 2e-3, 4e-3),
    "fedmosaic": (5e-4, 1e-3, 2e-3),
    **dict.fromkeys(("heterofl", "fedrolex"), (3e-4, 1e-3, 3e-3)),
    "fed_sb": (3e-3, 1e-2),
    "scaffold": (0.05, 0.2, 0.5, 2.0),
}


def key(suite: str, method: str, rate: float, seed: int) -> str:
    """Name of one cell."""
    return f"{suite}|{method}|{rate:g}|{seed}"


def read_cells() -> dict[str, Any]:
    """All cells measured so far."""
    cells: dict[str, Any] = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    return cells


def shipped(method: str) -> dict[str, Any]:
    """A method's preset."""
    path = conf_root() / "strategy" / f"{SHIPPED_AS.get(method, method)}.yaml"
    entry: dict[str, Any] = yaml.safe_load(path.read_text())
    return entry


def not_here(name: str, method: str) -> bool:
    """Whether a row belongs to other suites."""
    return method in WITH_LORA and not SUITES[name].method


def refusal(suite: Suite, method: str) -> str | None:
    """Why a method cannot run on a suite; None where it can."""
    config = compose(suite.preset, suite.overrides())
    entry = shipped(method)
    try:
        check_strategy(method, entry, config)
    except ConfigError as error:
        return str(error)
    return None


def measure(name: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """One real Flower simulation: a method at some learning rates and seeds; returns its cells."""
    suite = SUITES[name]
    entry = shipped(method)
    extra = OPTIONS.get(method, {})
    entry |= {**extra, "train": {**entry.get("train", {}), **extra.get("train", {})}}
    strategies = {
        f"{method}-{rate:g}": {**entry, "train": {**entry.get("train", {}), "learning_rate": rate}}
        for rate in rates
    }
    preset = suite.compared(name, strategies, seeds)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(preset, file)
        file.flush()
        results = flower_run(file.name, suite.overrides())
    cells = {}
    by_name = dict(zip(strategies, rates, strict=True))
    for run in results["runs"]:
        rows = [
            {
                field: row[field]
                for field in ("client_id", "type", "global_accuracy", "personal_accuracy")
            }
            for row in run["clients"]
        ]
        cells[key(name, method, by_name[run["strategy"]], run["seed"])] = {
            "clients": rows, "bytes": run["bytes"], "seconds": round(run["seconds"], 1),
            "peak_memory_mb": run["peak_memory_mb"], "machine": machine(),
        }  # fmt: skip
    return cells


def mean_accuracy(cell: dict[str, Any]) -> float:
    """Mean global accuracy over the clients."""
    rows = cell["clients"]
    return float(sum(row["global_accuracy"] for row in rows) / len(rows))


def best_rate(name: str, method: str, cells: dict[str, Any]) -> float | None:
    """The best learning rate of a finished sweep."""
    rates = SUITES[name].rates_of(method)
    if len(rates) == 1:
        return rates[0]
    found = {rate: swept(name, method, rate, cells) for rate in rates}
    if any(value is None for value in found.values()):
        return None
    return max(found, key=lambda rate: found[rate] or 0.0)


def swept(name: str, method: str, rate: float, cells: dict[str, Any]) -> float | None:
    """Mean accuracy of a rate over the suite's sweep seeds; None where one is missing."""
    found = [cells.get(key(name, method, rate, seed)) for seed in SUITES[name].sweep]
    return float(np.mean([mean_accuracy(cell) for cell in found if cell])) if all(found) else None


def plan(suites: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Measure what is missing, cell by cell; yields a line after each."""
    for name in suites:
        for method in methods:
            if not_here(name, method) or refusal(SUITES[name], method):
                continue
            cells = read_cells()
            rates = SUITES[name].rates_of(method)
            missing = [r for r in rates if swept(name, method, r, cells) is None]
            if missing and len(rates) > 1:
                yield _keep(measure(name, method, missing, SUITES[name].sweep))
            rate = best_rate(name, method, read_cells())
            assert rate is not None
            for seed in seeds:  # a run each: one cut short loses one seed's minutes, not all
                if key(name, method, rate, seed) not in read_cells():
                    yield _keep(measure(name, method, [rate], [seed]))


def forget(suites: Sequence[str], methods: Sequence[str]) -> None:
    """Drop the cells of some methods on some suites: those of a method that has changed."""
    left = {
        name: cell
        for name, cell in read_cells().items()
        if name.split("|")[0] not in suites or name.split("|")[1] not in methods
    }
    atomic_write_text(CELLS, json.dumps(left, indent=1) + "\n")


def _keep(new: dict[str, Any]) -> str:
    RESULTS.mkdir(exist_ok=True)
    atomic_write_text(CELLS, json.dumps({**read_cells(), **new}, indent=1) + "\n")
    return "; ".join(f"{name}: {100 * mean_accuracy(cell):.1f} %" for name, cell in new.items())


def table(suites: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Per suite and method: the cells of its best rate, the sweep, or why it was refused."""
    cells = read_cells()
    found: dict[str, Any] = {}
    for name in suites:
        for method in RATES:
            if not_here(name, method):
                continue
            rate = best_rate(name, method, cells)
            if rate is None:
                if reason := refusal(SUITES[name], method):
                    found.setdefault(name, {})[method] = {"refused": reason}
                continue
            chosen = {s: cells.get(key(name, method, rate, s)) for s in seeds}
            if all(chosen.values()):
                tried = {r: swept(name, method, r, cells) for r in SUITES[name].rates_of(method)}
                sweep = {f"{r:g}": round(100 * a, 2) for r, a in tried.items() if a is not None}
                found.setdefault(name, {})[method] = {"rate": rate, "sweep": sweep, "cells": chosen}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--report", action="store_true", help="only write the tables of what is there"
    )
    parser.add_argument(
        "--again", action="store_true", help="forget these suites' and methods' cells first"
    )
    args = parser.parse_args()
    if args.again:
        forget(args.suites, args.methods)
    bank_alone = [name for name, suite in SUITES.items() if not suite.method]
    if not args.report:
        for line in plan(args.suites, args.methods, args.seeds):
            print(line, flush=True)
            write_report(table(list(SUITES), args.seeds), args.seeds, bank_alone)
    write_report(table(list(SUITES), args.seeds), args.seeds, bank_alone)


if __name__ == "__main__":
    main()
