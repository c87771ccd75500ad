"""Seconds of a pass through each embedded backbone and back, products in float32 and as the CPU does bfloat16.

Which of the two a run takes is :func:`heterotune_flwr.backbones.cpu_compute.slow_bfloat16`'s answer, in the file too.

Run: ``python -m benchmarks.speed.cpu_products`` (a minute).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time
from typing import Any

import torch

from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.backbones import loading
from heterotune_flwr.backbones.cpu_compute import slow_bfloat16
from heterotune_flwr.backbones.loading import BackboneSpec

_BACKBONES = (("tiny-a", "bf16"), ("tiny-b", "int8"), ("tiny-c", "nf4"))
_TEXTS, _TOKENS, _REPEATS = 64, 24, 7


def seconds(spec: BackboneSpec, wide: bool) -> float:
    """Median processor seconds of one pass and back (one thread)."""
    loading.clear_backbones()
    loading.slow_bfloat16 = lambda: wide  # type: ignore[assignment]
    model = loading.load_backbone(spec, "cpu").model
    ids = torch.randint(5, 500, (_TEXTS, _TOKENS), generator=torch.Generator().manual_seed(0))
    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = []
    for _ in range(_REPEATS):
        begin = time.process_time()
        model.model(inputs_embeds=states).last_hidden_state.float().square().sum().backward()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def main() -> None:
    arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "float32_is_taken": slow_bfloat16(), "texts": _TEXTS, "tokens": _TOKENS, "repeats": _REPEATS,
    }  # fmt: skip
    for source, bits in _BACKBONES:
        spec = BackboneSpec(source, bits)
        wide, narrow = seconds(spec, wide=True), seconds(spec, wide=False)
        values[f"{source}@{bits}"] = {
            "float32_seconds": round(wide, 3), "bfloat16_seconds": round(narrow, 3), "ratio": round(narrow / wide, 2),
        }  # fmt: skip
        say(f"{source}@{bits}: float32 {wide:.2f} s, bfloat16 {narrow:.2f} s")
    write_results("cpu_products", values)


if __name__ == "__main__":
    main()
