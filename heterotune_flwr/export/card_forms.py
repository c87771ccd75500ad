"""Parts of the card of a model in a form that needs nothing of ours: how it is loaded, how well it stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.tuning.kept_model import KeptFacts

#: Per cent of a gain that are worth no word.
_ENOUGH = 95.0
_WHAT = {
    "lora": "A standard LoRA adapter",
    "merged": "A plain model folder",
    "gguf": "A GGUF file",
}


def what_converted(conversion: Mapping[str, Any], kind: str) -> str:
    """What the folder is, and what it was made from."""
    made = "that is exactly" if conversion["exactly"] else "distilled from"
    return f"{_WHAT[conversion['form']]} {made} a {kind} adapter"


def load_converted(facts: ExportFacts) -> list[str]:
    """Lines that load it; nothing of heterotune-flwr is needed."""
    base = facts.record.backbone
    lines = {
        "lora": [
            "With `peft` alone (`adapter_config.json` names the base model):",
            "",
            "```python\nfrom peft import AutoPeftModelForCausalLM\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("OUT")\n```',
            "",
            f"It was trained on the base model at {base.bits}; other bits do too, with small differences.",
            "It changes the unembedding beside its weight, so that the embedding stays what it is. Do not merge it in "
            "place where the two are one matrix: export the model `--as merged`.",
        ],
        "merged": [
            "With `transformers` alone:",
            "",
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            'model = AutoModelForCausalLM.from_pretrained("OUT")\n'
            'tokenizer = AutoTokenizer.from_pretrained("OUT")\n```',
            "",
            f"Its weights are those of the base model at {base.bits}, as ordinary numbers.",
        ],
        "gguf": [
            "With llama.cpp and what is built on it (Ollama, LM Studio), or in Python:",
            "",
            '```python\nfrom llama_cpp import Llama\nmodel = Llama("OUT/NAME.gguf")\n```',
            "",
            '`transformers` reads it too: `from_pretrained("OUT", gguf_file="NAME.gguf")`.',
        ],
    }[facts.conversion["form"]]
    return [*lines, how_asked(facts.record)]


def how_asked(record: KeptFacts) -> str:
    """How a prompt is written."""
    told = f"Prompts are written as in training: `{record.form.prompt!r}`"
    if record.form.template == "plain":
        return f"{told}."
    system = f", with the system prompt {record.form.system!r}" if record.form.system else ""
    return f"{told}, in the model's own chat template where it has one{system}."


def faithful(facts: ExportFacts) -> list[str]:
    """How much of its gain it keeps, and how often it says the same."""
    found, rank = facts.conversion["fidelity"], facts.conversion["rank"]
    if found is None:
        return [f"It is the model itself, as a LoRA of rank {rank}."]
    loss, right = found["loss"], found["accuracy"]
    rows = [
        f"| {title} | {loss[name]:.3f} | {100 * right[name]:.1f} |"
        for name, title in (("bare", "untouched"), ("model", "the model"), ("lora", "this"))
    ]
    lines = [
        f"{told(facts.conversion)} Rank {rank}, measured on {found['examples']} examples.",
        "",
        "| | loss, nats | right, % |",
        "|---|---|---|",
        *rows,
    ]
    if facts.record.loss == "labels":
        lines += [
            "",
            "Asked freely it answers with a label: what the model does only where labels alone may be said.",
        ]
    return lines


def told(conversion: Mapping[str, Any]) -> str:
    """One sentence on how well it stands for the model."""
    found = conversion["fidelity"]
    if found is None:
        return "It is the model itself."
    same = f"it gives the same answer in {100 * found['agreement']:.0f} %"
    if found["gain_kept"] is None:
        return f"The model gained nothing over the untouched one here; {same}."
    kept = 100 * found["gain_kept"]
    less = "" if kept >= _ENOUGH else " That is little: without --as the whole model is exported."
    return f"It keeps {kept:.0f} % of the model's gain over the untouched one, and {same}.{less}"
