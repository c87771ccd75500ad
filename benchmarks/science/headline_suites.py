"""Suites and rows of :mod:`.headline`: tasks, families, clients and texts; options and rates of every row.

*Claims* are a task (:mod:`.tasks`) by a family by the clients of each type. What is chosen there is chosen on dev texts
with dev seeds. *Earlier* suites are of the first edition: everything was chosen on the texts that are told.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import yaml

from benchmarks.science import tasks
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.data.sources import global_test, training_pool
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.schema import DataConfig

#: One seed on which a rate is chosen; where a run takes seconds three, for one alone chooses by luck.
SWEEP_SEED, SWEEP_SEEDS = 9, (7, 8, 9)
#: Of claims: on which everything is chosen, on dev texts; on which it is told, on test texts.
DEV_SEEDS, CLAIM_SEEDS = (10, 11, 12), tuple(range(20, 28))
#: Public texts of the task's kind on ``near12`` (clients draw from the other 3,036).
NEAR_TEXTS = 2000


@dataclass(frozen=True)
class Row:
    """A shipped strategy, what it has here beside its preset, and the rates that are tried.

    ``lora``: a row of the suites on which LoRA trains in every method; ``suites``: of these alone.
    """

    rates: Sequence[float]
    ships_as: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False
    suites: Sequence[str] = ()


_BANK, _LORA = (1e-3, 4e-3), (3e-4, 1e-3)
#: A variant of rivals, and what it is.
ANNEALED = "annealed"
_ANNEALED = {"train": {"last_rate": 0.05, "warmup_ratio": 0.5}}
#: As measured before there was a warm-up, on the suites that were measured so.
_COLD, _COLD_ON = {"train": {"last_rate": 0.05, "warmup_ratio": 0.0}}, ("embedded3", "embedded12")
_INDISCRIMINATE: Mapping[str, Any] = {"statistics": None}
#: HeteroTune's anchors where LoRA trains.
_MORE = {"anchors": 768, "pool": 6000, "batch": 64}
_WITHIN = {"predictions": {**_MORE, "pool_over": "type"}}
_TRANSFER = {"predictions": {**_MORE, "entropy_power": 0.0}}
_AS_MANY = {"predictions": {"anchors": 512, "pool": 1024, "batch": 64, "entropy_power": 0.0}}
#: Where the bank alone trains, a run takes seconds.
BANKED = (
    "heterotune", "heterotune_plain", "within_discriminant", "bank", "predictions", "mean", "within_type",
    "within_consensus", "local_only", "fedprox", "fedadam",
)  # fmt: skip
_OWN: Mapping[str, Any] = {
    "predictions": {"anchors": 512, "pool": 1024, "batch": 64, "pool_over": "type"}
}
#: Parts of ``heterotune``, and what of it a type has by itself: its controls (docs/strategies.md, Compositions).
_COMPOSED = {
    "within_discriminant": Row(_BANK, "within_type", {
        **_OWN, "statistics": {"weight": 0.3, "pool_over": "type"}, "method": {"views": ["text"]},
    }),
    "bank": Row(_BANK, "heterotune", {"predictions": None, "statistics": None, "method": {}}),
    "within_consensus": Row(_BANK, "within_type", _OWN),
}  # fmt: skip
ROWS: dict[str, Row] = {
    **{name: _COMPOSED.get(name, Row(_BANK)) for name in BANKED},
    "heterotune_plain": Row(_BANK, "heterotune", _INDISCRIMINATE),
    "predictions": Row(_BANK, "heterotune", {"personalization_phase": 0.95, **_INDISCRIMINATE}),
    "lora_at_home": Row(
        (2e-3,), "heterotune", {"method": {"core_scope": "client"}, **_INDISCRIMINATE}, True
    ),
    "heterotune_lora": Row((8e-3,), lora=True),
    "heterotune_without_discriminant": Row((8e-3,), "heterotune_lora", _INDISCRIMINATE, True),
    "heterotune_lora_cold": Row(
        (8e-3,), "heterotune_lora", {**_COLD, **_INDISCRIMINATE}, True, _COLD_ON
    ),
    "within_consensus_annealed": Row((8e-3,), "within_type", {**_WITHIN, **_ANNEALED}, True),
    "within_consensus_cold": Row(
        (8e-3,), "within_type", {**_WITHIN, **_COLD}, True, _COLD_ON
    ),
    "fedmkt64_annealed": Row((2e-3, 4e-3), "fedmkt", {**_TRANSFER, **_ANNEALED}, True),
    "fedmkt64_cold": Row((2e-3, 4e-3), "fedmkt", {**_TRANSFER, **_COLD}, True, _COLD_ON),
    "fedit_annealed": Row((1e-3, 2e-3, 4e-3), "fedit", _ANNEALED, True),
    "fedmkt64": Row(_LORA, "fedmkt", _AS_MANY),
    **{
        name: Row(_LORA)
        for name in ("fedit", "fedmkt", "ffa_lora", "rolora", "hetlora", "flexlora", "fedex_lora", "flora")
    },
    "co_lora": Row((1e-3, 2e-3, 4e-3)),
    "fedmosaic": Row((5e-4, 1e-3, 2e-3)),
    **{name: Row((3e-4, 1e-3, 3e-3)) for name in ("heterofl", "fedrolex")},
    "fed_sb": Row((3e-3, 1e-2)),
    "scaffold": Row((0.05, 0.2, 0.5, 2.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """Clients of some model types on a task: of :mod:`.tasks`, or, without one, the demonstration's."""

    preset: str
    types: Sequence[tuple[str, str]]
    clients: int
    method: Sequence[str] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sweep: Sequence[int] = (SWEEP_SEED,)
    sweeps: Mapping[str, Sequence[int]] = field(default_factory=dict)
    near_texts: bool = False
    rounds: int = 10
    task: str = ""

    @property
    def with_lora(self) -> bool:
        """Whether LoRA trains in every method."""
        return set(_DEEP) <= set(self.method)

    def in_seconds(self, method: str) -> bool:
        """Whether a run takes seconds: the bank alone is trained, on kept states."""
        return method in BANKED and not self.with_lora

    def rates_of(self, method: str) -> Sequence[float]:
        """Learning rates tried for a method here; a single one is not swept."""
        return self.rates.get(method, ROWS[method].rates)

    def sweep_of(self, method: str) -> Sequence[int]:
        """Seeds on which a method's rate is chosen here."""
        return self.sweeps.get(method, self.sweep)

    def compared(
        self, name: str, strategies: Mapping[str, Any], seeds: Sequence[int]
    ) -> dict[str, Any]:
        """The preset of a run of these strategies here."""
        preset: dict[str, Any] = yaml.safe_load((conf_root() / f"{self.preset}.yaml").read_text())
        run = {"name": name, "compare": list(strategies), "seeds": list(seeds)}
        return {**preset, "strategies": dict(strategies), "run": run}

    def overrides(self, part: str = "test") -> list[str]:
        """Overrides that make the preset's federation this one, tested on dev or test texts."""
        entries = [
            f"{{backbone: {backbone}, bits: {bits}, clients: {self.clients}}}"
            for backbone, bits in self.types
        ]
        return [
            f"types=[{', '.join(entries)}]", "server.evaluate_every=0", f"server.rounds={self.rounds}",
            *self.method, *(near_texts() if self.near_texts else ()),
            *(tasks.overrides(self.task, part, self.clients * len(self.types)) if self.task else ()),
        ]  # fmt: skip


@functools.cache
def near_texts() -> tuple[str, ...]:
    """Overrides for public texts of the task's own kind: some of its texts, without labels, that no client owns."""
    pool = [asdict(example) for example in training_pool(DataConfig())]
    order = np.random.default_rng(0).permutation(len(pool)).tolist()
    public, owned = order[:NEAR_TEXTS], [pool[index] for index in sorted(order[NEAR_TEXTS:])]
    folder = cache_dir() / "near-texts"
    folder.mkdir(parents=True, exist_ok=True)
    test = [asdict(example) for example in global_test(DataConfig())]
    anchors = [{"text": pool[index]["text"]} for index in public]
    for name, rows in (("anchors", anchors), ("train", owned), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write_text(folder / f"{name}.jsonl", lines)
    files = [f"data.{name}={folder}/{name}.jsonl" for name in ("train", "test")]
    form = ("data.prompt=Package: {text}\nSection:", "data.template=plain")
    return (*files, *form, f"alignment.anchors={folder}/anchors.jsonl")


_TINY = [("tiny-a", "bf16"), ("tiny-b", "int8"), ("tiny-c", "nf4")]
_REAL = [("smollm2", "nf4"), ("gemma3-270m", "int8"), ("smollm2-pruned", "bf16")]
_FIVE = [*_TINY, ("tiny-b", "nf4"), ("tiny-c", "bf16")]
#: LoRA beside the bank, averaged inside a type; where a step through a real backbone takes seconds, the bank alone.
_DEEP = (
    "method.core_kind=lora", "method.core_rank=16", "method.core_from=0.0", "method.core_scale=2.0",
)  # fmt: skip
_DEEPS = ("heterotune_lora", "heterotune_without_discriminant", "heterotune_lora_cold")
#: LoRA and bank together, one client per type.
_BOTH = {
    **dict.fromkeys((*BANKED, "fedmkt64"), (1e-3, 2e-3)),
    **dict.fromkeys(_DEEPS, (4e-3, 8e-3)),
    **dict.fromkeys(("fedmkt64_annealed", "fedmkt64_cold"), (2e-3, 4e-3, 8e-3)),
}
#: The best of ``embedded3`` and ``embedded6``, where a sweep would take an hour.
_KNOWN: Mapping[str, Sequence[float]] = {
    **dict.fromkeys((*BANKED, "fedit", "fedmkt", "fedmkt64"), (1e-3,)),
    "heterotune_plain": (2e-3,),
    "within_consensus": (2e-3,),
}
#: The rivals inside a type, who may want another rate where they are more.
_BOTH_RIVALS = {
    **_KNOWN,
    **dict.fromkeys(("within_type", "within_consensus", "fedit"), (1e-3, 2e-3)),
    "within_consensus_annealed": (4e-3, 8e-3),
}
_SLOW: Mapping[str, Sequence[float]] = {
    **dict.fromkeys(BANKED, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    **dict.fromkeys(("fedit", "fedmkt", "fedmkt64"), (1e-3,)),
}
_NEAR = {**_KNOWN, "heterotune_lora": (8e-3,), "fedmkt64_annealed": (4e-3,)}


def _tiny(clients: int, rates: Mapping[str, Sequence[float]], *method: str, **more: Any) -> Suite:
    return Suite("demo", _TINY, clients, (*_DEEP, *method), rates, **more)


def _bank_alone(preset: str, types: Sequence[tuple[str, str]], clients: int) -> Suite:
    swift = dict.fromkeys(BANKED, (2e-3, 4e-3, 8e-3))
    return Suite(
        preset, types, clients, rates=swift if preset == "demo" else _SLOW, sweep=SWEEP_SEEDS
    )


EARLIER = {
    "embedded3": _tiny(1, _BOTH, sweeps={"heterotune_lora": SWEEP_SEEDS}),
    "embedded6": _tiny(2, _BOTH_RIVALS),
    "embedded12": _tiny(4, _KNOWN),
    "embedded48": _tiny(16, _KNOWN, "server.participation=0.25"),
    "bank3": _bank_alone("demo", _TINY, 1),
    "bank6": _bank_alone("demo", _TINY, 2),
    "bank12": _bank_alone("demo", _TINY, 4),
    "sections12": _tiny(4, _KNOWN, "alignment.anchors=debian-near"),
    "real2": _bank_alone("real", _REAL[:2], 1),
    "real2x2": _bank_alone("real", _REAL[:2], 2),
    "real3": _bank_alone("real", _REAL, 1),
    "real3x2": _bank_alone("real", _REAL, 2),
    "types5": Suite("demo", _FIVE, 2, _DEEP, _KNOWN),
    "near12": _tiny(4, _NEAR, near_texts=True),
    "parent3": Suite("demo", [("tiny-c", "bf16")], 3, _DEEP, _KNOWN),
}
#: The first type of a family is the smallest in memory: the one that all clients could run.
FAMILIES = {
    "smollm2_gemma": _REAL[:2],
    "smollm2_pruned": [_REAL[0], _REAL[2]],
    "embedded": _TINY[:2],
}


@dataclass(frozen=True)
class ClaimRow:
    """A Flower row of the claims; each has four trials.

    ``variants``: ``annealed`` has a sinking rate and a warm-up; ``stops_early``: after the round that is best on dev.
    """

    values: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    variants: tuple[str, ...] = ("",)
    factor: float | None = 2.0
    stops_early: bool = False


#: A run takes hours: four configurations, no more.
_THROUGH_BACKBONES = ClaimRow((1e-3, 3e-3), ("", ANNEALED), None, stops_early=True)
CLAIM_ROWS = {
    **dict.fromkeys(("heterotune", "heterotune_plain", "within_discriminant"), ClaimRow()),
    **dict.fromkeys(("fedit", "fedmkt", "fedmosaic"), _THROUGH_BACKBONES),
}
#: What trains through the backbone, hours a run, is tried on one dev seed alone.
_ON_ONE = {name: DEV_SEEDS[:1] for name, row in CLAIM_ROWS.items() if row.stops_early}
CLAIMS = {
    f"{task}.{family}.{clients}": Suite(
        "demo" if family == "embedded" else "real", types, clients, sweep=DEV_SEEDS, sweeps=_ON_ONE, task=task,
    )
    for task in tasks.TASKS for family, types in FAMILIES.items() for clients in (1, 2, 4)
}  # fmt: skip
SUITES = {**EARLIER, **CLAIMS}


def trial(method: str, rate: float, variant: str = "") -> dict[str, Any]:
    """A row at a learning rate, as an entry of ``strategies``: its preset, and what it has beside it here."""
    entry, extra = shipped(method), ROWS[method].options
    train = {**entry.get("train", {}), **extra.get("train", {})}
    train |= _ANNEALED["train"] if variant == ANNEALED else {}
    return {**entry, **extra, "train": {**train, "learning_rate": rate}}


def shipped(method: str) -> dict[str, Any]:
    """A row's preset, without what it has beside it here."""
    path = conf_root() / "strategy" / f"{ROWS[method].ships_as or method}.yaml"
    entry: dict[str, Any] = yaml.safe_load(path.read_text())
    return entry


def not_here(name: str, method: str) -> bool:
    """Whether a row belongs to other suites."""
    row = ROWS[method]
    return (row.lora and not SUITES[name].with_lora) or (
        bool(row.suites) and name not in row.suites
    )
