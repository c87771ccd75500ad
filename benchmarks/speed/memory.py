"""Peak memory of one training step, HeteroTune against LoRA as FlowerTune LLM trains it.

Same backbone, bits, batch (2 x 512 tokens, a loss at every position), gradient checkpointing. Peaks are resident bytes
above those of a process that has imported everything and loaded nothing, so weights, activations, optimizer and
what the libraries leave lying about all count; every kind of step in a process of its own.

``peak_ratio.<bits>``: HeteroTune as the presets train it (last slot), running the backbone in this step / LoRA r=32,
both with gradient checkpointing, FlowerTune's default. Kept states, deeper slots and no checkpointing are in ``steps``.

Run: ``heterotune fetch smollm2; python -m benchmarks.speed.memory`` (about 15 minutes on 2 cores).
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.runner import arguments, in_own_process, say, write_results

#: What is measured at every bit width, and at 4 bits alone: name -> arguments of the step's process.
MAIN = {
    "lora32": ["--kind", "lora", "--checkpoint"],
    "last_slot": ["--kind", "heterotune", "--checkpoint"],
}
MORE = {
    "last_slot.kept": ["--kind", "heterotune", "--kept"],
    "upper_half": ["--kind", "heterotune", "--slots", "upper-half", "--checkpoint"],
    "upper_half.kept": ["--kind", "heterotune", "--slots", "upper-half", "--checkpoint", "--kept"],
    "all_slots": ["--kind", "heterotune", "--slots", "all", "--checkpoint"],
    "all_slots.kept": ["--kind", "heterotune", "--slots", "all", "--checkpoint", "--kept"],
    "lora32.no_checkpointing": ["--kind", "lora"],
    "upper_half.no_checkpointing": ["--kind", "heterotune", "--slots", "upper-half"],
    "all_slots.no_checkpointing": ["--kind", "heterotune", "--slots", "all"],
}


def measure_step(words: list[str]) -> dict[str, Any]:
    """Medians of one kind of step, in a process of its own (megabytes, seconds)."""
    found = in_own_process("benchmarks.speed.memory_step", *words)
    return {
        "peak_mb": round(statistics.median(found["peak_bytes"]) / 1e6, 1),
        "weights_mb": round(found["weight_bytes"] / 1e6, 1),
        "live_mb": round(found["live_bytes"] / 1e6, 1),
        "seconds": round(statistics.median(found["seconds"]), 4),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--backbone", default="smollm2", help="another one is measured, not written"
    )
    parser.add_argument("--bits", nargs="+", default=["nf4", "int8", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 512 tokens")
    parser.add_argument("--more", default="nf4", help="bits at which everything is measured")
    args = parser.parse_args()
    values: dict[str, Any] = {"backbone": args.backbone, "batch": args.batch, "runs": args.repeats}
    for bits in args.bits:
        kinds = {**MAIN, **(MORE if bits == args.more else {})}
        steps = values.setdefault("steps", {}).setdefault(bits, {})
        for name, words in kinds.items():
            common = ["--backbone", args.backbone, "--bits", bits, "--batch", str(args.batch),
                      "--repeats", str(args.repeats)]  # fmt: skip
            steps[name] = measure_step([*words, *common])
            say(f"{bits:5} {name:28} {steps[name]}")
        for name, found in steps.items():
            rival = "lora32.no_checkpointing" if name.endswith("no_checkpointing") else "lora32"
            found["ratio"] = round(found["peak_mb"] / steps[rival]["peak_mb"], 3)
        values[f"peak_ratio.{bits}"] = steps["last_slot"]["ratio"]
        if args.backbone == "smollm2":
            write_results("memory", values)


if __name__ == "__main__":
    main()
