"""Does sharing across types help where answers are generated? Open text through Flower, all at their own best rates.

Tasks, from the shipped Debian data: ``names`` (a package's name from its description) and ``sections`` (its section,
as text, over the whole vocabulary). Families: the embedded one (2 clients of each of 3 types, or 1), real ones. Alone,
inside each type and across types; every method first at each learning rate with a seed of its own (``SWEEP_SEED``; the
rate with the best ROUGE-L on the global test is taken), then at that rate with ``SEEDS``; last, both ways of sharing
with random maps, as a control: what averaging gives without any alignment. Token losses know no
discount of label frequencies, so some of any averaging's gain is that it averages the clients' skews away.

Measured on the global test: exact match and ROUGE-L of the greedy answers (the first ``GENERATED`` examples), and the
cross-entropy per answer token (all examples), which needs far fewer examples to tell two methods apart.

Run: ``python -m benchmarks.generation`` (about 20 minutes per row of the embedded family on 2 busy cores, hours for
the real one, which needs ``--instructions``), or ``--rows`` of it. A row that is done is not
done again. Writes ``benchmarks/results/generation.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Key,
    flower_run,
    mean_and_std,
    paired_gain,
    read_results,
    seed_means,
    write_results,
)

SEEDS = [20, 21]
SWEEP_SEED = 9
GENERATED = 320
STRATEGIES = ("local_only", "within_type", "heterotune")
MEASURES = ("loss", "rouge_l", "exact_match")
#: Losses are reported as they are, shares in percent.
SCALE = {"loss": 1.0, "rouge_l": 100.0, "exact_match": 100.0}


@dataclass(frozen=True)
class Row:
    """A task on a family under one alignment; ``tasks``: of Natural Instructions, in task files."""

    preset: str = "open_text"
    tasks: Sequence[str] = ()
    overrides: Sequence[str] = ()
    rates: Sequence[float] = (0.001, 0.003, 0.01)
    rounds: int = 15


NAMES = (
    "data.label_field=id", "data.prompt=Package: {text}\nName:", "data.max_answer_tokens=16",
    "data.examples_per_client=256",
)  # fmt: skip
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
    "tiny, sections, words": Row(overrides=("alignment.positions=words",)),
    "tiny, sections, one client each": Row(overrides=[f"types.{n}.clients=1" for n in range(3)]),
    "tiny, names": Row(overrides=NAMES, rates=(0.0003, 0.001, 0.003)),
    "real, instructions": Row(
        "instructions",
        TASKS,
        (*SMOLLM2, "data.generate=64"),
        (0.001, 0.003),
        6,
    ),
}


def measure(results: dict[str, Any], strategy: str, name: str) -> dict[Key, float]:
    """(seed, type, client id) -> a measure on the global test."""
    return {
        (run["seed"], client["type"], client["client_id"]): SCALE[name] * client[f"global_{name}"]
        for run in results["runs"]
        if run["strategy"] == strategy
        for client in run["clients"]
    }


def run_row(
    row: Row, seeds: list[int], rates: Mapping[str, float], extra: Sequence[str] = ()
) -> dict[str, Any]:
    """One Flower run of the strategies in ``rates``, each at its rate."""
    results = flower_run(
        row.preset,
        [
            f"data.generate={GENERATED}", *row.overrides, *extra, f"server.rounds={row.rounds}",
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
    for rival in [r for r in ("local_only", "within_type") if f"{r}.loss" in table]:
        table[f"gain_over_{rival}"] = {
            n: paired_gain(measure(results, "heterotune", n), measure(results, rival, n)) for n in MEASURES
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
    for rate in [rate for rate in row.rates if f"{rate:g}" not in found.get("heterotune", {})]:
        results = run_row(row, [SWEEP_SEED], dict.fromkeys(STRATEGIES, rate))
        for strategy in STRATEGIES:
            found.setdefault(strategy, {})[f"{rate:g}"] = {
                measured: round(seed_means(measure(results, strategy, measured))[0], 2)
                for measured in MEASURES
            }
        write_results("generation", {"seeds": SEEDS, name: {"sweep": found}})
    return {
        strategy: float(max(rates, key=lambda rate: rates[rate]["rouge_l"]))
        for strategy, rates in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument(
        "--instructions",
        type=Path,
        help="extract of Natural Instructions (.jsonl.gz: task, instruction, input, output, refs)",
    )
    args = parser.parse_args()
    for name in args.rows:
        row = ROWS[name]
        if row.tasks:
            if args.instructions is None:
                continue
            folder = Path(tempfile.mkdtemp(prefix="heterotune-tasks-"))
            write_task_files(args.instructions, row.tasks, folder)
            row = replace(row, overrides=(*row.overrides, f"data.train={folder}"))
        if "control_random_maps" in read_results("generation").get(name, {}):
            continue
        rates = sweep(name, row)
        values: dict[str, Any] = {"rounds": row.rounds, "learning_rates": rates}
        values |= summary(run_row(row, SEEDS, rates))
        write_results("generation", {"seeds": SEEDS, name: values})
        print(name, json.dumps(values), flush=True)
        pair = {key: rates[key] for key in STRATEGIES[1:]}
        control = summary(run_row(row, SEEDS, pair, ["alignment.control=random_maps"]))
        write_results("generation", {"seeds": SEEDS, name: {"control_random_maps": control}})


if __name__ == "__main__":
    main()
