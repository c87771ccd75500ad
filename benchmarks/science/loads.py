"""Exported models in forms that need nothing of ours: how well they stand for the model, and whether they load.

A federation runs; of one client of every type the federated model is written as a LoRA, a plain folder and a GGUF file.
It is measured on its own test and its choosing set, which neither the model nor the LoRA was made from.

* ``lora_gain_kept``: share of the gain over the bare backbone, in mean loss, that the LoRA keeps; where the federated
  model gains nothing, of the model trained alone.
* ``lora_agreement``: share of answers (labels; of text: tokens) that are the model's.
* ``gguf_loads``: 1 where the ``gguf`` package reads every tensor, transformers has the merged model's logits from the
  file, and llama.cpp, where it is installed, splits prompts into the same tokens and continues them with the same.

    python -m benchmarks.science.loads                     # the embedded family: 5 minutes on two cores
    python -m benchmarks.science.loads --real              # SmolLM2 too (heterotune fetch smollm2): half an hour
    python -m benchmarks.science.loads --runs DIRECTORY... # of runs that are there
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import arguments, flower_run, say, write_results
from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.export.convert import Conversion, convert
from heterotune_flwr.export.gguf import write_gguf
from heterotune_flwr.export.opened import open_export
from heterotune_flwr.export.own_examples import OwnExamples, own_data
from heterotune_flwr.export.write import maps_of, write
from heterotune_flwr.tuning.kept_model import ALONE, FEDERATED, Kept, find_kept

STRATEGY = "heterotune"
_REAL = (
    "types=[{backbone: smollm2, bits: nf4, clients: 1}, {backbone: tiny-b, bits: int8, clients: 1}]",
    "data.examples_per_client=64", "data.personal_test_examples=24", "data.global_test_examples=16",
    "alignment.count=300", "alignment.components=128", "method.latent=64", "train.local_steps=8",
)  # fmt: skip
_TEXT = ("data.generate=0", "data.personal_test_examples=32")
CASES: dict[str, tuple[str, Sequence[str]]] = {
    "labels, tiny": ("demo", ()),
    "text, tiny": ("open_text", _TEXT),
}
REAL: dict[str, tuple[str, Sequence[str]]] = {
    "labels, smollm2": ("demo", _REAL),
    "text, smollm2": ("open_text", (*_REAL, "data.generate=0")),
}
#: Prompts that llama.cpp continues.
PROMPTS = 8
#: How far transformers' logits may lie from the merged model's: it computes in another dtype.
_NEAR = 0.05


def main() -> None:
    """Measure every case, and write what all of them come to."""
    parser = arguments(__doc__)
    parser.add_argument("--real", action="store_true", help="SmolLM2 too")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", nargs="+", type=Path, help="run directories that are there")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="heterotune-loads-") as scratch:
        runs = {run.name: run for run in given.runs or ()}
        for name, (preset, words) in (
            {} if runs else {**CASES, **(REAL if given.real else {})}.items()
        ):
            runs[name] = Path(scratch) / name.replace(", ", "-")
            settings = [f"server.rounds={given.rounds}", f"run.compare=[{STRATEGY}]", *words]
            flower_run(preset, settings, keep=runs[name])
        for name, run in runs.items():
            records = {k.facts.type_key: k for k in reversed(find_kept(run, strategy=STRATEGY))}
            for key, kept in sorted(records.items()):
                found[f"{name}, {key}"] = measured(run, kept, Path(tempfile.mkdtemp(dir=scratch)))
                say(name, key, found[f"{name}, {key}"])
                write_results("loads", {"models": found, **worst(found)})


def worst(found: dict[str, Any]) -> dict[str, float | None]:
    """The smallest value of every measure over all models."""
    names = ("lora_gain_kept", "lora_agreement", "gguf_loads")
    values = {name: [m[name] for m in found.values() if m[name] is not None] for name in names}
    return {name: min(values[name], default=None) for name in names}


def measured(run: Path, kept: Kept, folder: Path) -> dict[str, Any]:
    """What one client's model comes to in both forms."""
    config, data = own_data(run, kept.facts)
    held = [*data.choosing, *data.personal_test]
    examples = OwnExamples(data.train, held, load_anchors(config.alignment))
    lora = _converted(kept, FEDERATED, "lora", examples, folder)
    which = FEDERATED
    if lora.fidelity is not None and lora.fidelity.gain_kept is None:
        which, lora = ALONE, _converted(kept, ALONE, "lora", examples, folder)
    fidelity = lora.fidelity
    assert fidelity is not None
    _converted(kept, which, "merged", examples, folder)
    file = folder / "model.gguf"
    write_gguf(folder / f"{which}-merged", file, "model")
    prompts = [data.train[i].text for i in range(min(PROMPTS, len(data.train)))]
    loads, by = gguf_loads(file, folder / f"{which}-merged", prompts)
    return {
        "model": which,
        "lora_gain_kept": fidelity.gain_kept,
        "lora_agreement": fidelity.agreement,
        "examples": fidelity.examples,
        "loss": fidelity.loss,
        "accuracy": fidelity.accuracy,
        "rank": lora.rank,
        "gguf_loads": loads,
        "gguf_read_by": by,
    }


def _converted(
    kept: Kept, which: str, form: str, examples: OwnExamples, folder: Path
) -> Conversion:
    """One client's federated model, or the one trained alone, in a form."""
    own = folder / which
    if not own.exists():
        record = kept.load()
        write(record, which, own, maps=maps_of(kept.folder.parents[2], record))
    return convert(open_export(own), form, examples, folder / f"{which}-{form}")


def gguf_loads(file: Path, merged: Path, prompts: Sequence[str]) -> tuple[float, list[str]]:
    """1 where a GGUF file is the merged folder's model to all that read it here, else 0; and who read it."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    stored = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    good = stored == sum(parameter.numel() for parameter in model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    lines = [tokenizer(text)["input_ids"][:128] for text in prompts]
    by = ["gguf", "transformers"]
    with torch.no_grad():
        wanted = [model(torch.tensor([line])).logits[0, -1].float() for line in lines]
        found = [theirs(torch.tensor([line])).logits[0, -1].float() for line in lines]
    good &= all(bool((a - b).abs().max() < _NEAR) for a, b in zip(wanted, found, strict=True))
    try:
        from llama_cpp import Llama
    except ImportError:
        return float(good), by
    llama = Llama(str(file), n_ctx=256, logits_all=True, verbose=False)
    for text, line, logits in zip(prompts, lines, wanted, strict=True):
        good &= llama.tokenize(text.encode(), add_bos=True, special=True)[:128] == line
        llama.reset()
        llama.eval(line)
        good &= int(llama.scores[len(line) - 1].argmax()) == int(logits.argmax())
    llama.close()
    return float(good), [*by, "llama.cpp"]


if __name__ == "__main__":
    main()
