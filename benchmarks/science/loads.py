"""Exported models in forms that need nothing of ours: how well they stand for the model, and whether they load.

A client's federated model is written as a LoRA, a plain folder and a GGUF file. It is measured on its own test and its
choosing set, which neither the model nor the LoRA was made from. ``benchmarks.science.export`` runs this.

* ``lora_gain_kept``: share of the gain over the bare backbone, in mean loss, that the LoRA keeps; where the federated
  model gains nothing, of the model trained alone.
* ``lora_agreement``: share of answers (labels; of text: tokens) that are the model's.
* ``gguf_loads``: 1 where the ``gguf`` package reads every tensor, transformers has the merged model's logits from the
  file, and llama.cpp, where it is installed, splits prompts into the same tokens and continues them with the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import say
from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.export.convert import Conversion, changes_of_lora, convert
from heterotune_flwr.export.gguf import write_gguf
from heterotune_flwr.export.merged import write_merged
from heterotune_flwr.export.opened import open_export
from heterotune_flwr.export.own_examples import OwnExamples, own_data
from heterotune_flwr.export.write import maps_of, write
from heterotune_flwr.tuning.adapters import detach
from heterotune_flwr.tuning.kept_model import ALONE, FEDERATED, Kept

#: Prompts that llama.cpp continues.
PROMPTS = 8
#: How far transformers' logits may lie from the merged model's: it computes in another dtype.
_NEAR = 0.05


def other_forms(run: Path, kept: Kept, folder: Path) -> dict[str, Any]:
    """What one client's model comes to in other forms, which are written into the new ``folder``."""
    folder.mkdir()
    config, data = own_data(run, kept.facts)
    held = [*data.choosing, *data.personal_test]
    examples = OwnExamples(data.train, held, load_anchors(config.alignment))
    lora = _distilled(kept, FEDERATED, examples, folder)
    which = FEDERATED
    if lora.fidelity is not None and lora.fidelity.gain_kept is None:
        which, lora = ALONE, _distilled(kept, ALONE, examples, folder)
    fidelity = lora.fidelity
    assert fidelity is not None
    base, merged, file = kept.facts.backbone, folder / "merged", folder / "model.gguf"
    backbone = load_backbone(BackboneSpec(base.source, base.bits, base.revision))
    detach(backbone)
    write_merged(backbone, changes_of_lora(folder / f"{which}-lora"), merged)
    write_gguf(merged, file, "model")
    prompts = [data.train[i].text for i in range(min(PROMPTS, len(data.train)))]
    loads, by = gguf_loads(file, merged, prompts)
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


def _distilled(kept: Kept, which: str, examples: OwnExamples, folder: Path) -> Conversion:
    """One client's federated model, or the one trained alone, as a LoRA."""
    record = kept.load()
    write(record, which, folder / which, maps=maps_of(kept.folder.parents[2], record))
    return convert(
        open_export(folder / which), "lora", examples, folder / f"{which}-lora", report=say
    )


def gguf_loads(file: Path, merged: Path, prompts: Sequence[str]) -> tuple[float, list[str]]:
    """1 where a GGUF file is the merged folder's model to all that read it here, else 0; and who read it."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    stored = sum(
        int(tensor.n_elements)
        for tensor in GGUFReader(file).tensors
        if tensor.name != "rope_freqs.weight"  # of positions, no weight
    )
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
