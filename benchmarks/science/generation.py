"""Does sharing across types help where answers are generated? Open text through Flower, all at their own best rates.

Tasks: a Debian package's section, as text, over the whole vocabulary, on the embedded family with 2 clients of each of
3 types, or 1; four tasks of Natural Instructions on a real one. Methods: alone; inside each type; the same, and each
type learns from its own predictions on public prompts (``within_consensus``); across types the bank alone (``bank``),
and with predictions (``heterotune``). Every method first at each of its learning rates with a seed of its own (the rate
with the best ROUGE-L is taken), then at that rate with ``SEEDS``; last, both ways of averaging with random maps, as a
control. Token losses know no discount of label frequencies, so some of any averaging's gain is that it averages the
clients' skews away.

Measured on the global test: exact match and ROUGE-L of the greedy answers (the first ``GENERATED`` examples), and the
cross-entropy per answer token (all examples), which needs far fewer examples to tell two methods apart.

Run: ``python -m benchmarks.science.generation`` (a quarter of an hour to an hour per row of the embedded family on 2
cores, hours for the real one, which needs ``--instructions``), or ``--rows`` of it. A row that is done is not done
again, unless ``--again``.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.runner import (
    SEEDS,
    Key,
    arguments,
    by_client,
    flower_run,
    mean_and_std,
    paired_gain,
    read_results,
    say,
    seed_means,
    write_results,
)

SWEEP_SEED = 9
GENERATED = 320
#: Tried where a row does not say otherwise; the more clients share, the higher.
RATES: Mapping[str, Sequence[float]] = {
    "local_only": (0.001, 0.003),
    "within_type": (0.001, 0.003, 0.01),
    "within_consensus": (0.001, 0.003, 0.01),
    "bank": (0.003, 0.01),
    "heterotune": (0.003, 0.01),
}
#: Those that no preset is (docs/strategies.md, Compositions).
COMPOSED = (
    "strategies.within_consensus={_component_: heterotune_flwr.strategies.WithinType, "
    "predictions: {anchors: 512, pool: 1024, batch: 64}}",
    "strategies.bank={_component_: heterotune_flwr.strategies.HeteroTune}",
)
MEASURES = ("loss", "rouge_l", "exact_match")
#: Losses are reported as they are, shares in percent.
SCALE = {"loss": 1.0, "rouge_l": 100.0, "exact_match": 100.0}


@dataclass(frozen=True)
class Row:
    """A task on a family under one alignment; ``tasks``: of Natural Instructions, in task files."""

    preset: str = "open_text"
    tasks: Sequence[str] = ()
    overrides: Sequence[str] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=lambda: RATES)
    rounds: int = 15


#: Short inputs and answers; every model type trains on two of them and is tested on all four.
TASKS = (
    "subtask004_mctaco_answer_generation_event_duration", "subtask019_mctaco_temporal_reasoning_category",
    "subtask036_qasc_topic_word_to_generate_related_fact", "subtask039_qasc_find_overlapping_words",
)  # fmt: skip
SMOLLM2 = (
    "types=[{backbone: smollm2, bits: nf4, clients: 2}, {backbone: smollm2-pruned, bits: bf16, clients: 2}]",
    "data.examples_per_client=48", "data.personal_test_examples=16", "data.global_test_examples=64",
    "train.local_steps=8", "train.batch_size=8", "alignment.count=1000", "alignment.components=128",
)  # fmt: skip
ROWS: Mapping[str, Row] = {
    "tiny, sections": Row(),
    "tiny, sections, one client each": Row(overrides=[f"types.{n}.clients=1" for n in range(3)]),
    "real, instructions": Row(
        "instructions",
        TASKS,
        (*SMOLLM2, "data.generate=64", "data.template=plain"),
        dict.fromkeys(RATES, (0.001, 0.003)),
        6,
    ),
}


def measure(results: dict[str, Any], strategy: str, name: str) -> dict[Key, float]:
    """(seed, type, client id) -> a measure on the global test."""
    return by_client(results, strategy, f"global_{name}", SCALE[name])


def run_row(
    row: Row, seeds: list[int], rates: Mapping[str, float], extra: Sequence[str] = ()
) -> dict[str, Any]:
    """One Flower run of the strategies in ``rates``, each at its rate."""
    results = flower_run(
        row.preset,
        [
            f"data.generate={GENERATED}", *row.overrides, *extra, *COMPOSED,
            f"server.rounds={row.rounds}",
            *(f"strategies.{name}.train.learning_rate={rate}" for name, rate in rates.items()),
            f"run.seeds={seeds}".replace(" ", ""), f"run.compare=[{','.join(rates)}]",
        ],
    )  # fmt: skip
    shutil.rmtree(results["run_dir"], ignore_errors=True)
    return results


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread over seeds of every strategy and measure; before training; gains of sharing across types."""
    table: dict[str, Any] = {}
    for strategy in dict.fromkeys(run["strategy"] for run in results["runs"]):
        for name in MEASURES:
            means = seed_means(measure(results, strategy, name))
            table[f"{strategy}.{name}"], table[f"{strategy}.{name}.std"] = mean_and_std(means)
        own = [run["overall"]["personal_rouge_l_mean"] for run in results["runs"]
               if run["strategy"] == strategy]  # fmt: skip
        table[f"{strategy}.personal_rouge_l"] = mean_and_std([100 * value for value in own])[0]
    before = results["runs"][0]["before"]["overall"]
    table["before"] = {n: round(SCALE[n] * before[f"global_{n}_mean"], 2) for n in MEASURES}
    ran = [name for name in RATES if f"{name}.loss" in table]
    for ours in [name for name in ran if name.startswith("heterotune")]:
        for rival in ran[: ran.index(ours)]:
            table[f"{ours}.gain_over_{rival}"] = {
                n: paired_gain(measure(results, ours, n), measure(results, rival, n)) for n in MEASURES
            }  # fmt: skip
    return table


def write_task_files(extract: Path, tasks: Sequence[str], folder: Path) -> None:
    """Task files in the published form from an extract, one .jsonl.gz row per instance."""
    found: dict[str, dict[str, Any]] = {name: {"Instances": []} for name in tasks}
    with gzip.open(extract, "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            if (task := found.get(row["task"])) is not None:
                task["Definition"] = [row["instruction"].removeprefix("Definition:").strip()]
                outputs = [row["output"], *row["refs"]]
                task["Instances"].append({"input": row["input"], "output": outputs})
    for name, task in found.items():
        (folder / f"{name}.json").write_text(json.dumps(task))


def sweep(name: str, row: Row) -> dict[str, float]:
    """Every strategy's best rate by ROUGE-L on the global test, from a seed of its own."""
    found: dict[str, dict[str, dict[str, float]]] = (
        read_results("generation").get(name, {}).get("sweep", {})
    )
    for rate in sorted({rate for rates in row.rates.values() for rate in rates}):
        missing = [
            strategy
            for strategy, rates in row.rates.items()
            if rate in rates and f"{rate:g}" not in found.get(strategy, {})
        ]
        if not missing:
            continue
        results = run_row(row, [SWEEP_SEED], dict.fromkeys(missing, rate))
        for strategy in missing:
            found.setdefault(strategy, {})[f"{rate:g}"] = {
                measured: round(seed_means(measure(results, strategy, measured))[0], 2)
                for measured in MEASURES
            }
        write_results("generation", {name: {"sweep": found}})
    return {
        strategy: float(max(found[strategy], key=lambda rate: found[strategy][rate]["rouge_l"]))
        for strategy in row.rates
    }


def run(name: str, row: Row) -> None:
    """Everything of one row, kept as it is done."""
    rates = sweep(name, row)
    values: dict[str, Any] = {"seeds": SEEDS, "rounds": row.rounds, "learning_rates": rates}
    values |= summary(run_row(row, SEEDS, rates))
    write_results("generation", {name: values})
    say(name, json.dumps(values))
    pair = {key: rates[key] for key in ("within_type", "heterotune")}
    control = summary(run_row(row, SEEDS, pair, ["alignment.control=random_maps"]))
    write_results("generation", {name: {"control_random_maps": control}})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--instructions", type=Path, help="Natural Instructions: .jsonl.gz with task, "
                        "instruction, input, output, refs")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="forget the rows' results first")
    args = parser.parse_args()
    rows = [n for n in args.rows if args.instructions is not None or not ROWS[n].tasks]
    known = read_results("generation")
    if args.again:
        known = {name: values for name, values in known.items() if name not in rows}
        write_results("generation", known, anew=True)
    for name in rows:
        if "control_random_maps" in known.get(name, {}):
            continue
        if not ROWS[name].tasks:
            run(name, ROWS[name])
            continue
        with tempfile.TemporaryDirectory(prefix="heterotune-tasks-") as folder:
            write_task_files(args.instructions, ROWS[name].tasks, Path(folder))
            overrides = (*ROWS[name].overrides, f"data.train={folder}")
            run(name, replace(ROWS[name], overrides=overrides))


if __name__ == "__main__":
    main()
