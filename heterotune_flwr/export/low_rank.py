"""A low-rank change of linear layers: what a standard LoRA adapter holds, and what is merged into weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterotune_flwr.exchange.storage import save_tensors


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one linear layer: ``up down`` (out x k, k x in) added to its weight, and a ``bias`` (out)."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None


#: By name of the layer in the backbone's model.
Changes = Mapping[str, LowRank]


def head_name(model: Any) -> str:
    """Name of a causal LM's unembedding among its modules."""
    head: nn.Module = model.get_output_embeddings()
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[head]


def write_lora(changes: Changes, base: str, revision: str | None, target: Path) -> None:
    """Write changes, all of one rank and all with a bias or none, as an adapter folder in PEFT's own format.

    ``base``, ``revision``: what the adapter says its base model is. An unembedding that is the embedding's matrix is
    changed beside it: PEFT adds the change to the layer's output, so that the embedding stays.
    """
    from peft import LoraConfig

    first = next(iter(changes.values()))
    rank = int(first.down.shape[0])
    target.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(changes),
        lora_bias=first.bias is not None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    config.save_pretrained(target)
    tensors = {}
    for name, change in changes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = change.down
        tensors[f"{prefix}.lora_B.weight"] = change.up
        if change.bias is not None:
            tensors[f"{prefix}.lora_B.bias"] = change.bias
    plain = {name: value.detach().cpu().float().numpy() for name, value in tensors.items()}
    save_tensors(target / "adapter_model.safetensors", plain, {"format": "pt"})


@torch.no_grad()
def sparse_rows(rows: Tensor, places: list[int], count: int) -> Tensor:
    """Rows (n x k) at their places among ``count`` rows of zeros; what shares a place adds up."""
    table = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    return table.index_add_(0, torch.tensor(places, device=rows.device), rows)
