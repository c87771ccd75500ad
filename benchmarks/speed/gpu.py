"""Peak GPU memory and seconds of one training step at the sizes labs hold: HeteroTune against LoRA.

Backbones have the shapes of well-known models and random weights: neither bytes nor seconds depend on what the
weights say, and nothing has to be downloaded. Same backbone, bits, batch (sequences of 512 tokens, a loss at
every position), gradient checkpointing. Rivals: LoRA r=16 on all linear layers (``lora16``), and FlowerTune LLM's LoRA
r=32 on queries and values (``lora32``), both prepared by PEFT. ``peak_mb`` is PyTorch's own count of what was
allocated at most, weights included, in 10^6 bytes.

Run: ``python -m benchmarks.speed.gpu`` (one NVIDIA GPU of 40 GB or more, 35 GB of disk, about 5
minutes).

With ``--federated``: whole runs instead, of three rounds and three clients with a model each, shaped like Llama-3.2-1B,
3.2-3B and 3.1-8B, with one tokenizer, at nf4 and at bf16. Every client has a process of its own on the one GPU, and
gets its messages as a node does. Open text, 8 steps of 4 sequences of 512 tokens a round. Rows: HeteroTune with kept
states and without, and LoRA r=16 (FedIT). Of each type: seconds of every client-round, from message to reply; peak GB
in them, weights included; kB each way. Besides: the server's step on these updates, which a CPU takes, against its
formula in float64 on the GPU; and the embedded family's demonstration on GPU and CPU, as it ships and at 32 bits.

Run: ``python -m benchmarks.speed.gpu --federated --toy`` first: the same at toy size, on the GPU or without one, in a
minute; it keeps no number. Then ``python -m benchmarks.speed.gpu --federated`` (a GPU of 80 GB, 64 GB of memory, 45 GB
of disk; about ten minutes by the seconds of single steps, at most ``--minutes`` and what a cell begun in time still
takes). Cells are kept as they are done, the most important first: the same command goes on.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import arguments, say, write_results
from benchmarks.speed.gpu_federated import federated
from benchmarks.speed.memory_step import (
    ALL_LINEAR,
    FLOWERTUNE,
    long_texts,
    lora_model,
    lora_step,
    our_step,
)
from benchmarks.speed.shapes import SHAPES, make_checkpoint
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

#: Shapes whose single steps are measured.
SINGLE = ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"]
LENGTH = 512
#: name -> trained slots, from kept states.
OURS = {
    "last_slot": ("last-1", False),
    "last_slot.kept": ("last-1", True),
    "upper_half": ("upper-half", False),
    "all_slots": ("all", False),
}
RIVALS = {"lora16": ALL_LINEAR, "lora32": FLOWERTUNE}


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
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=SINGLE)
    parser.add_argument("--bits", nargs="+", default=["nf4", "int8", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--federated", action="store_true", help="whole runs instead of steps")
    parser.add_argument("--toy", action="store_true", help="federated: tiny, keeps no number")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="federated: no cell begins later"
    )
    parser.add_argument(
        "--folder", type=Path, help="federated: where checkpoints stay for a further call"
    )
    args = parser.parse_args()
    if args.federated:
        raise SystemExit(bool(federated(args.toy, args.folder, args.minutes).left))
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
