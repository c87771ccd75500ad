"""Do models of different families teach each other to answer, in a whole run as a user starts it?

Four tasks of Natural Instructions, a task per client, two clients of each of two types; public prompts of the same four
tasks, answered once by a bare model, on which types are compared and predictions are told. The laboratory's table of
the same question (:mod:`.instructions`) has more rows and ceilings; this one goes through Flower, workers and
personalization. Learning rates and rounds are those that the laboratory chose on dev texts.

Rows: ``local_only``; ``within_type``; across types the ``bank`` alone; ``heterotune`` with the phase in which each type
goes on with its own bank; the same ``shared`` in all rounds, as the presets of open text have it.

Measured on all four tasks and on a client's own, by test texts: cross-entropy per answer token; with ``--generate N``
ROUGE-L of greedy answers to the first N texts as well (Gemma writes for ten minutes a row at 64).

Run: ``python -m benchmarks.science.generation --instructions FILE.jsonl.gz`` (SmolLM2-135M nf4 and Gemma-3-270M int8:
eight minutes a row and seed on a core, half an hour with predictions). What is done is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import (
    SEEDS,
    Cells,
    add_instructions,
    arguments,
    flower_run,
    machine,
    say,
    write_results,
)
from benchmarks.science.intervals import two_way_interval
from benchmarks.science.laboratory.text_files import run_overrides

#: Fewer public prompts than on labels: an answer has many positions.
_PREDICTIONS = {"anchors": 128, "pool": 192, "batch": 32}
_COMPONENT = "heterotune_flwr.strategies.HeteroTune"
FAMILIES: Mapping[str, Sequence[tuple[str, str]]] = {
    "smollm2_gemma": (("smollm2", "nf4"), ("gemma3-270m", "int8")),
    "smollm2_pruned": (("smollm2", "nf4"), ("smollm2-pruned", "bf16")),
}
MEASURES = ("global_loss", "personal_loss", "global_rouge_l", "personal_rouge_l")


@dataclass(frozen=True)
class Row:
    """What a row is: learning rate and rounds, as chosen on dev texts, and what it has beside a shipped strategy."""

    rate: float
    rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)


_WHOLE = {"_component_": _COMPONENT, "predictions": _PREDICTIONS}
ROWS: Mapping[str, Row] = {
    "local_only": Row(0.002, 4),
    "within_type": Row(0.002, 4),
    "bank": Row(0.001, 8, {"_component_": _COMPONENT}),
    "heterotune": Row(0.002, 8, {**_WHOLE, "personalization_phase": 0.5}),
    "shared": Row(0.002, 8, {**_WHOLE, "personalization_phase": 0.0}),
}
RIVALS = ("local_only", "within_type")
_CELLS = Cells("generation_cells")


def measure(
    family: str, seed: int, names: Sequence[str], instructions: Path, generate: int
) -> None:
    """Rows that are not kept yet, a run each."""
    for name in names:
        if (cell := _cell(family, name, seed)) in _CELLS.read():
            continue
        results = flower_run("instructions", _overrides(family, seed, name, instructions, generate))
        _CELLS.keep({cell: _kept(results["runs"][0])})
        shutil.rmtree(results["run_dir"], ignore_errors=True)


def _cell(family: str, name: str, seed: int) -> str:
    return f"{family}|{name}|{seed}"


def _overrides(family: str, seed: int, name: str, instructions: Path, generate: int) -> list[str]:
    types = ", ".join(f"{{backbone: {b}, bits: {n}, clients: 2}}" for b, n in FAMILIES[family])
    row = ROWS[name]
    options = {**row.options, "train": {"learning_rate": row.rate}}
    own = (
        f"strategies.{name}={json.dumps(options)}" if row.options
        else f"strategies.{name}.train.learning_rate={row.rate}"
    )  # fmt: skip
    return [
        *run_overrides(instructions, "test"), f"types=[{types}]", "data.examples_per_client=96",
        "data.personal_test_examples=16", "data.global_test_examples=256", "data.max_length=320",
        f"data.generate={generate}", "train.local_steps=12", "train.batch_size=8", "server.evaluate_every=0",
        "run.workers=1", f"server.rounds={row.rounds}", f"run.seeds=[{seed}]", f"run.compare=[{name}]", own,
    ]  # fmt: skip


def _kept(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run: every client's measures, untouched and at the end, and what it took home."""
    return {
        "clients": [
            {
                "type": client["type"], "took": client["kept"]["took"],
                **{name: client.get(name) for name in MEASURES},
                "bare": {name: client["kept"]["bare"].get(name) for name in MEASURES},
                "taken": {name: client["kept"]["taken"].get(name) for name in MEASURES},
            }
            for client in run["clients"]
        ],
        "correlation": run["alignment"], "bytes": run["bytes"], "seconds": round(run["seconds"], 1),
        "machine": machine(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ what they come to


def summary(family: str) -> dict[str, Any]:
    """Flat: ``<row>.<measure>``, by type, and gains over rivals with intervals.

    Of seeds that the rivals and the bank have; of rows that have all of these.
    """
    cells = _CELLS.read()
    seeds = sorted({int(name.split("|")[2]) for name in cells if name.startswith(f"{family}|")})
    seeds = [s for s in seeds if all(_cell(family, row, s) in cells for row in (*RIVALS, "bank"))]
    if not seeds:
        return {}
    rows = [row for row in ROWS if all(_cell(family, row, s) in cells for s in seeds)]
    found: dict[str, Any] = {"seeds": seeds}

    def told(row: str, measure: str, of: str | None = None) -> np.ndarray[Any, Any]:
        """Seeds x clients; losses in nats, ROUGE-L in percent."""
        scale = 1.0 if measure.endswith("loss") else 100.0
        clients = [cells[_cell(family, row, seed)]["clients"] for seed in seeds]
        # One client of a type tests what it kept on the common test; the others leave it out.
        return scale * np.array(
            [[(c[of] if of else c)[measure] for c in run] for run in clients], np.float64
        )

    types = np.array([c["type"] for c in cells[_cell(family, "bank", seeds[0])]["clients"]])
    # Without --generate nothing is written.
    written = [m for m in MEASURES if not any(np.isnan(told(row, m)).any() for row in rows)]
    for measure in written:
        bare = told("bank", measure, "bare")
        found[f"untouched.{measure}"] = np.nanmean(bare)
        for one in dict.fromkeys(types):
            found[f"untouched.{measure}.{one}"] = np.nanmean(bare[:, types == one])
        for row in rows:
            values = told(row, measure)
            found[f"{row}.{measure}"] = values.mean()
            for one in dict.fromkeys(types):
                found[f"{row}.{measure}.{one}"] = values[:, types == one].mean()
            if measure.startswith("personal"):
                found[f"{row}.taken.{measure}"] = told(row, measure, "taken").mean()
            for rival in RIVALS if row not in RIVALS else ():
                gains = (values - told(rival, measure)).mean(axis=1, keepdims=True)
                found[f"{row}.over_{rival}.{measure}.gain"] = gains.mean()
                if len(seeds) > 1:
                    for end, value in two_way_interval(gains).items():
                        found[f"{row}.over_{rival}.{measure}.{end}"] = value
    for row in rows:
        took = [c["took"] for s in seeds for c in cells[_cell(family, row, s)]["clients"]]
        found[f"{row}.took_federated"] = f"{took.count('federated')} of {len(took)}"
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in found.items()}


def main() -> None:
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add_instructions(parser)
    parser.add_argument("--generate", type=int, default=0, metavar="N",
                        help="write the answers to N texts too, for ROUGE-L")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="forget these families' rows first")
    given = parser.parse_args()
    if given.instructions is None:
        parser.error("name the extract of Natural Instructions: --instructions FILE.jsonl.gz")
    if given.again:
        chosen = {(family, row) for family in given.families for row in given.rows}
        _CELLS.forget(lambda cell: tuple(cell.split("|")[:2]) in chosen)
    for seed in given.seeds:
        for family in given.families:
            measure(family, seed, given.rows, given.instructions, given.generate)
            if values := summary(family):
                write_results("generation", {family: values})
                say(family, seed, values)


if __name__ == "__main__":
    main()
