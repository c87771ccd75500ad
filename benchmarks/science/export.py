"""What an exported model is worth outside its run, by its own adapter and in forms that need nothing of ours.

A federation runs; one client of every type is exported, as its owner would. By its own adapter, in fresh processes:

* ``metric_difference``: the farthest that any measure of any model (untouched, alone, federated), by ``heterotune
  evaluate`` on the client's own test, lies from what the run reported.
* ``logit_difference``: the farthest that a logit at a prompt's end lies, loaded by PEFT alone, from that of the same
  model attached as in a run (of labels: their logits with all that is added to them; of text: all logits).

In other forms (``benchmarks.science.loads``): ``lora_gain_kept``, ``lora_agreement`` and ``gguf_loads``.

Every case is kept as its models are measured, and replaces only itself. The numbers above the cases are the worst of
all that are there; ``measured`` and ``missing`` say which those are.

    python -m benchmarks.science.export                  # the embedded family: 10 minutes on two cores
    python -m benchmarks.science.export --real           # SmolLM2 too (heterotune fetch smollm2): an hour
    python -m benchmarks.science.export --cases "text, tiny" --runs DIRECTORY   # of a run that is there
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import (
    arguments,
    flower_run,
    read_results,
    say,
    use_test_helpers,
    write_results,
)
from benchmarks.science.loads import other_forms
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.export.write import maps_of
from heterotune_flwr.runs import open_run
from heterotune_flwr.tuning.kept_model import Kept, KeptModel, find_kept

#: Prompts whose logits are compared.
PROMPTS = 16


@dataclass(frozen=True)
class Case:
    """A federation, and the type whose models are exported (None: one client of every type)."""

    preset: str
    strategy: str
    overrides: Sequence[str] = ()
    type_key: str | None = None

    @property
    def real(self) -> bool:
        """Whether a fetched backbone is among its types."""
        return self.type_key is not None


_REAL = (
    "types=[{backbone: smollm2, bits: nf4, clients: 1}, {backbone: tiny-b, bits: int8, clients: 1}]",
    "data.examples_per_client=64", "data.personal_test_examples=24", "data.global_test_examples=16",
    "alignment.count=2000", "alignment.components=128", "method.latent=64", "train.local_steps=8",
)  # fmt: skip
_TEXT = ("data.generate=16", "data.personal_test_examples=32")
CASES: Mapping[str, Case] = {
    "labels, tiny": Case("demo", "heterotune"),
    "text, tiny": Case("open_text", "heterotune", _TEXT),
    "labels, smollm2": Case("demo", "heterotune", _REAL, "smollm2@nf4"),
    "text, smollm2": Case("open_text", "heterotune", (*_REAL, "data.generate=8"), "smollm2@nf4"),
}


@dataclass(frozen=True)
class Exported:
    """One client's export folder, the record it is made of, and its own test."""

    out: Path
    kept: Kept
    record: KeptModel
    rows: Path
    examples: Sequence[Example]


def main() -> None:
    """Measure the cases, one after the other, and write what each comes to."""
    parser = arguments(__doc__)
    parser.add_argument("--real", action="store_true", help="SmolLM2 too")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="these alone")
    parser.add_argument("--runs", nargs="+", type=Path, help="their run directories, in that order")
    given = parser.parse_args()
    names = given.cases or [name for name, case in CASES.items() if given.real or not case.real]
    runs: Sequence[Path | None] = given.runs or [None] * len(names)
    if len(runs) != len(names):
        parser.error(f"--runs has {len(runs)} directories for {len(names)} cases: {names}")
    for name, run in zip(names, runs, strict=True):
        for found in run_case(CASES[name], given.rounds, run):
            keep(name, found)


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Write a case beside those that are there, and what all of them come to."""
    say(name, found)
    cases = {**read_results("export").get("cases", {}), name: found}
    cases = {case: cases[case] for case in CASES if case in cases}
    missing = [case for case in CASES if case not in cases]
    missing += [f"{case}, {key}" for case, row in cases.items() for key in row["missing"]]
    head = {"measured": list(cases), "missing": missing}
    write_results("export", {**worst(cases), **head, "cases": cases}, anew=True)


def worst(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The worst of every measure; None where nothing has it (a model that gains nothing has no ``lora_gain_kept``)."""
    found: dict[str, float | None] = {}
    for name, choose in WORST.items():
        values = [row[name] for row in measured.values() if row[name] is not None]
        found[name] = choose(values) if values else None
    return found


def run_case(case: Case, rounds: int, run: Path | None = None) -> Iterator[dict[str, Any]]:
    """What the exported models of a federation come to, after every one; it runs first, unless there is a ``run``."""
    with tempfile.TemporaryDirectory(prefix="heterotune-export-") as scratch:
        folder = Path(scratch)
        if run is None:
            run = folder / "run"
            words = [f"server.rounds={rounds}", f"run.compare=[{case.strategy}]", *case.overrides]
            flower_run(case.preset, words, keep=run)
        head = {"strategy": case.strategy, "rounds": open_run(run).config.server.rounds}
        records = find_kept(run, strategy=case.strategy, type_key=case.type_key)
        first = {kept.facts.type_key: kept for kept in reversed(records)}
        clients: dict[str, dict[str, Any]] = {}
        for key, kept in sorted(first.items()):
            clients[key] = measured(run, kept, folder)
            missing = sorted(first.keys() - clients.keys())
            yield {**worst(clients), **head, "missing": missing, "clients": clients}


def measured(run: Path, kept: Kept, folder: Path) -> dict[str, Any]:
    """All that is measured of one client's exported model."""
    one = export(run, kept, folder)
    return {
        "client": kept.facts.client_id,
        "metric_difference": metric_difference(one),
        "logit_difference": logit_difference(one),
        **other_forms(run, kept, folder / f"{kept.facts.client_id}-forms"),
    }


def export(run: Path, kept: Kept, folder: Path) -> Exported:
    """Export a client as its owner would, and write its own test into a file."""
    client = kept.facts.client_id
    out, rows = folder / client, folder / f"{client}.jsonl"
    _command("export", run, out, "--client", client, "--strategy", kept.facts.strategy)
    config = open_run(run).config
    clients = sum(item.clients for item in config.types)
    examples = client_examples(
        config.data, int(client.rpartition("-")[2]), clients, kept.facts.seed
    ).personal_test
    lines = [
        json.dumps({"text": e.text, "label": e.label, "references": list(e.references)})
        for e in examples
    ]
    rows.write_text("".join(line + "\n" for line in lines))
    return Exported(out, kept, kept.load(), rows, examples)


def metric_difference(one: Exported) -> float:
    """How far measures of the three models lie from those the run reported."""
    said = _command("evaluate", one.out, "--data", one.rows, "--json")
    models: dict[str, dict[str, float]] = json.loads(said)["models"]
    tests = ExportFacts.load(one.out).record.tests
    pairs = [
        (value, tests[model][f"personal_{name}"])
        for model, measured in models.items()
        for name, value in measured.items()
    ]
    return max(abs(ours - theirs) for ours, theirs in pairs)


#: Somebody else's process: PEFT, and the one import that registers the adapter's kind.
_ELSEWHERE = """
import json, sys, torch
import heterotune_flwr.dema
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    rows = [model(torch.tensor([ids])).logits[0, -1].float() for ids in json.load(open(sys.argv[2]))]
torch.save(torch.stack(rows), sys.argv[3])
"""


def logit_difference(one: Exported) -> float:
    """How far logits at the ends of prompts lie, loaded elsewhere, from those of the model attached as in a run."""
    import torch

    use_test_helpers("export")
    from records import attached_label_logits, attached_logits, prompts_of

    which = ExportFacts.load(one.out).model
    maps = maps_of(one.kept.folder.parents[2], one.record)
    examples = list(one.examples[:PROMPTS])
    columns: list[int] | slice = slice(None)
    if one.record.loss == "labels":
        ids, columns, wanted = attached_label_logits(one.record, maps, examples, which)
    else:
        ids = prompts_of(one.record, examples)
        wanted = attached_logits(one.record, maps, ids, which)
    asked, found = one.rows.with_suffix(".ids.json"), one.rows.with_suffix(".pt")
    asked.write_text(json.dumps(ids))
    subprocess.run([sys.executable, "-c", _ELSEWHERE, one.out, asked, found], check=True)
    difference = torch.load(found)[:, columns] - wanted
    return float(difference.abs().max())


def _command(*words: object) -> str:
    """``heterotune ...`` in a process of its own; what it prints."""
    command = [sys.executable, "-m", "heterotune_flwr.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


#: What counts of several models.
WORST: Mapping[str, Callable[[Sequence[float]], float]] = {
    "metric_difference": max,
    "logit_difference": max,
    "lora_gain_kept": min,
    "lora_agreement": min,
    "gguf_loads": min,
}


if __name__ == "__main__":
    main()
