"""Peak GPU memory and seconds of one training step at the sizes labs hold: HeteroTune against LoRA.

Backbones have the shapes of well-known models and random weights: neither bytes nor seconds depend on what the
weights say, and nothing has to be downloaded. Same backbone, bits, batch (sequences of 512 tokens, a loss at
every position), gradient checkpointing. Rivals: LoRA r=16 on all linear layers (``lora16``), and FlowerTune LLM's LoRA
r=32 on queries and values (``lora32``), both prepared by PEFT. ``peak_mb`` is PyTorch's own count of what was
allocated at most, weights included, in 10^6 bytes.

Run: ``python -m benchmarks.speed.gpu`` (one NVIDIA GPU of 40 GB or more, 35 GB of disk, about 5
minutes).
"""

from __future__ import annotations

import gc
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import heterotune_flwr
from benchmarks.runner import arguments, say, write_results
from benchmarks.speed.memory_step import (
    ALL_LINEAR,
    FLOWERTUNE,
    long_texts,
    lora_model,
    lora_step,
    our_step,
)
from heterotune_flwr.backbones.loading import (
    Backbone,
    BackboneSpec,
    clear_backbones,
    load_backbone,
)
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.adapters import detach
from heterotune_flwr.tuning.memory import weight_bytes
from heterotune_flwr.tuning.task import make_task

#: Published configurations: width, blocks, feed-forward width, heads, key heads, vocabulary, one matrix at both ends.
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "smollm2-135m": (576, 30, 1536, 9, 3, 49_152, True),
    "llama-3.2-1b": (2048, 16, 8192, 32, 8, 128_256, True),
    "llama-3.1-8b": (4096, 32, 14_336, 32, 8, 128_256, False),
}
LENGTH = 512
#: name -> trained slots, from kept states.
OURS = {
    "last_slot": ("last-1", False),
    "last_slot.kept": ("last-1", True),
    "upper_half": ("upper-half", False),
    "all_slots": ("all", False),
}
RIVALS = {"lora16": ALL_LINEAR, "lora32": FLOWERTUNE}


def make_checkpoint(shape: str, folder: Path, device: str = "cuda") -> None:
    """Write a checkpoint of this shape with random weights and the embedded family's tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, inner, heads, key_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    embedded = Path(heterotune_flwr.__file__).parent / "assets" / "embedded" / "tiny-a"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder)


def kinds(backbone: Backbone, batches: Sequence[int]) -> Iterator[tuple[str, Callable[[], None]]]:
    """``<batch>.<kind>`` and its step, made when asked for; rivals last: PEFT's preparation changes the model."""
    data = compose("real").data
    texts = {batch: long_texts(backbone, batch, LENGTH) for batch in batches}
    for name, (slots, kept) in OURS.items():
        for batch in batches:
            config = TrainConfig(batch_size=batch, gradient_checkpointing=True, loss="tokens")
            task = make_task(backbone, data, label_set(data), config)
            yield f"{batch}.{name}", our_step(task, texts[batch], slots, kept, config, 1)
            detach(backbone)
    for name, lora in RIVALS.items():
        model = lora_model(backbone, True, lora)
        for batch in batches:
            yield f"{batch}.{name}", lora_step(model, texts[batch])
        model.unload()


def measure(backbone: Backbone, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """Peak megabytes and median seconds of each kind of step, and our peaks as shares of the rivals'."""
    found: dict[str, Any] = {"weights_mb": round(weight_bytes(backbone.model) / 1e6, 1)}
    for name, step in kinds(backbone, batches):
        step()
        seconds = []
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        found[name] = {"peak_mb": peak, "seconds": round(statistics.median(seconds), 4)}
        say(f"  {name:20} {found[name]}")
    for batch, rival in itertools.product(batches, RIVALS):
        for name in OURS:
            ours = found[f"{batch}.{name}"]
            share = ours["peak_mb"] / found[f"{batch}.{rival}"]["peak_mb"]
            ours[f"peak_ratio_{rival}"] = round(share, 3)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--bits", nargs="+", default=["nf4", "int8", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.speed.gpu measures an NVIDIA GPU, and PyTorch sees none here")
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": args.repeats}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(prefix="heterotune-gpu-") as folder:
            make_checkpoint(shape, Path(folder))
            for bits in args.bits:
                clear_backbones()
                gc.collect()
                torch.cuda.empty_cache()
                say(f"{shape} {bits}")
                backbone = load_backbone(BackboneSpec(folder, bits), "cuda")
                found = measure(backbone, args.batches, args.repeats)
                del backbone
                write_results("gpu", {**device, "steps": {shape: {bits: found}}})


if __name__ == "__main__":
    main()
