"""One kind of training step in a process of its own: its peak memory and its seconds, as one JSON line.

A process of its own, because an allocator keeps what an earlier kind of step has used. Run by
:mod:`benchmarks.speed.memory` and :mod:`benchmarks.speed.client_speed`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import arguments
from heterotune_flwr.backbones.cpu_compute import slow_bfloat16
from heterotune_flwr.backbones.loading import Backbone, BackboneSpec, load_backbone
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.memory import LiveBytes, weight_bytes
from heterotune_flwr.tuning.slots import lowest_slot
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, Task, make_task

#: FlowerTune LLM's adapter: rank, alpha, dropout; PEFT's default layers (queries and values).
FLOWERTUNE = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.075}
#: QLoRA's: every linear layer, at the rank all savings of bytes are measured against.
ALL_LINEAR = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
SLOTS = 4


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def settle() -> None:
    """Give free memory back to the system and forget the peak so far."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def long_texts(backbone: Backbone, batch: int, length: int) -> EncodedSet:
    """``batch`` sequences of ``length`` random tokens; every position has a loss."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(10, vocabulary, (batch, length + 1), generator=generator).tolist()
    return EncodedSet(
        [row[:-1] for row in ids], [list(range(length))] * batch, [row[1:] for row in ids]
    )


def lora_model(backbone: Backbone, checkpoint: bool, lora: Mapping[str, Any] = FLOWERTUNE) -> Any:
    """The backbone as PEFT prepares it, with LoRA."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = backbone.model
    if backbone.spec.bits in ("nf4", "int8"):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpoint,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM")).train()


def lora_step(model: Any, encoded: EncodedSet) -> Callable[[], None]:
    """A step as FlowerTune LLM does it: the model's own loss, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    device = model.device
    ids = torch.tensor(encoded.inputs, device=device)
    # As its trainer with bf16, where this device can; elsewhere in float32, the app's own default.
    mixed = device.type == "cuda" or not slow_bfloat16()

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    task: Task, encoded: EncodedSet, slots: str, kept: bool, config: TrainConfig, steps: int
) -> Callable[[], None]:
    """A client's local training; states are kept beforehand, where they are."""
    labels = len(task.labels) if task.kind == "labels" and task.labels else None
    method = MethodConfig(slots=1 if slots == "last-1" else SLOTS, output=labels)
    adapter = attach(task.backbone, method, method.output or method.latent)
    adapter.train_from(lowest_slot(slots, method.slots))
    adapter.load(initial_tensors(adapter.shapes, seed=0))
    rows = make_rows(adapter, encoded, cache=kept)
    work = replace(config, local_steps=steps)

    def step() -> None:
        fit(adapter, task, work, [Examples(rows)], seed=0)

    return step


def make_step(args: argparse.Namespace) -> tuple[Backbone, Callable[[], None]]:
    """The backbone and the step the arguments name."""
    # On the CPU whatever the machine has: these peaks are resident bytes (benchmarks/speed/gpu.py has the GPU's).
    backbone = load_backbone(BackboneSpec(args.backbone, args.bits), "cpu")
    data = compose("real").data
    config = TrainConfig(
        batch_size=args.batch, gradient_checkpointing=args.checkpoint, loss=args.loss
    )
    labels = label_set(data)
    task = make_task(backbone, data, labels, config)
    if args.loss == "tokens":
        encoded = long_texts(backbone, args.batch, args.length)
    else:
        encoded = task.encode(client_examples(data, 0, 4, 0).train)
    if args.kind == "lora":
        return backbone, lora_step(lora_model(backbone, args.checkpoint), encoded)
    return backbone, our_step(task, encoded, args.slots, args.kept, config, args.steps)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident growth over a process without a model, peak live tensors, seconds; per repeat."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(args.threads)
    torch.ones(64, 64) @ torch.ones(64, 64)
    settle()
    empty = _status("VmRSS")
    backbone, step = make_step(args)
    step()
    peaks, seconds = [], []
    for _ in range(args.repeats):
        settle()
        started = time.perf_counter()
        step()
        seconds.append((time.perf_counter() - started) / args.steps)
        peaks.append(_status("VmHWM") - empty)
    with LiveBytes() as live:
        step()
    return {
        "peak_bytes": peaks,
        "seconds": seconds,
        "weight_bytes": weight_bytes(backbone.model),
        "live_bytes": live.peak,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kind", choices=["heterotune", "lora"], required=True)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--bits", default="nf4")
    parser.add_argument("--slots", default="last-1")
    parser.add_argument("--kept", action="store_true", help="train from kept states")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--loss", choices=["tokens", "labels"], default="tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1, help="per repeat (heterotune only)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
