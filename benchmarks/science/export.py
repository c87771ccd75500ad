"""What an exported model is worth outside its run: does it measure the same, and give the same logits?

A federation runs; one client of every type is exported; all else happens in fresh processes, with its own test as rows.

* ``metric_difference``: the farthest that any measure of any model (untouched, alone, federated), by ``heterotune
  evaluate``, lies from what the run reported.
* ``logit_difference``: the farthest that a logit at a prompt's end lies, loaded by PEFT alone, from that of the same
  model attached as in a run (of labels: their logits with all that is added to them; of text: all logits).

    python -m benchmarks.science.export                  # the embedded family: 5 minutes on two cores
    python -m benchmarks.science.export --real           # SmolLM2 too (heterotune fetch smollm2): half an hour
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import arguments, flower_run, say, use_test_helpers, write_results
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


_REAL = (
    "types=[{backbone: smollm2, bits: nf4, clients: 2}, {backbone: tiny-b, bits: int8, clients: 2}]",
    "data.examples_per_client=64", "data.personal_test_examples=24", "data.global_test_examples=32",
    "alignment.count=500", "alignment.components=128", "train.local_steps=8",
)  # fmt: skip
_TEXT = ("data.generate=16", "data.personal_test_examples=32")
CASES: Mapping[str, Case] = {
    "labels, tiny": Case("demo", "heterotune"),
    "text, tiny": Case("open_text", "heterotune_answers", _TEXT),
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
    """Run the cases, one after the other, and write what each comes to."""
    parser = arguments(__doc__)
    parser.add_argument("--real", action="store_true", help="SmolLM2 too")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        if case.type_key is None or given.real:
            found[name] = run_case(case, given.rounds)
            say(name, found[name])
            write_results("export", {"cases": found, "rounds": given.rounds} | worst(found))


def worst(cases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The farthest of all cases."""
    names = {name for measured in cases.values() for name in measured if name in MEASURES}
    return {name: max(m[name] for m in cases.values() if name in m) for name in sorted(names)}


def run_case(case: Case, rounds: int) -> dict[str, float]:
    """One federation, and what its exported models come to."""
    folder = Path(tempfile.mkdtemp(prefix="heterotune-export-"))
    run = folder / "run"
    words = [f"server.rounds={rounds}", f"run.compare=[{case.strategy}]", *case.overrides]
    flower_run(case.preset, words, keep=run)
    records = find_kept(run, strategy=case.strategy, type_key=case.type_key)
    first = {kept.facts.type_key: kept for kept in reversed(records)}
    exported = [export(run, kept, folder) for _, kept in sorted(first.items())]
    found: dict[str, float] = {"models": float(len(exported))}
    for name, measure in MEASURES.items():
        found[name] = max(measure(one) for one in exported)
    shutil.rmtree(folder)
    return found


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


#: What is measured of every exported model; of several, the farthest counts.
MEASURES: Mapping[str, Callable[[Exported], float]] = {
    "metric_difference": metric_difference,
    "logit_difference": logit_difference,
}


if __name__ == "__main__":
    main()
