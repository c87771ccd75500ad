"""Tiny random decoders of several families, adapters with random values, and a naive DeMA in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from heterotune_flwr.backbones.structure import find_structure, slot_blocks
from heterotune_flwr.dema import DeMAConfig, read_maps, trainable_tensors

#: family -> (blocks, extra configuration); depths differ so that no family fits by luck
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (3, {}),
    "qwen2": (2, {}),
    "qwen3": (3, {"head_dim": 8}),
    "gemma3_text": (3, {"head_dim": 8}),
    "mistral": (2, {}),
    "gpt_neox": (3, {}),
}
VOCABULARY = 64
HIDDEN = 32


def tiny_model(
    family: str = "llama", layers: int | None = None, seed: int = 0, **further: Any
) -> Any:
    """A random causal LM in float32, evaluation mode; ``further`` configuration."""
    depth, extra = FAMILIES[family]
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**fields, **extra, **further})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # from_config's tiny weights would hide errors behind rounding
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim == 2:
                parameter.mul_(8)
    return model


def dema_config(**fields: Any) -> DeMAConfig:
    """A small adapter of several slots and experts."""
    small: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "slots": 2,
        "latent": 8,
        "output": 6,
        "inner": 5,
        "experts_global": 3,
        "seed": 3,
    }
    return DeMAConfig(**(small | fields))


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids, no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def randomize(model: Any, seed: int = 0, scale: float = 0.5) -> dict[str, np.ndarray]:
    """Give every trainable tensor of the active adapter a random value."""
    rng = np.random.default_rng(seed)
    trained = trainable_tensors(model)
    values = {
        name: (scale * rng.standard_normal(tuple(parameter.shape))).astype(np.float32)
        for name, parameter in trained.items()
    }
    with torch.no_grad():
        for name, value in values.items():
            trained[name].copy_(torch.from_numpy(value))
    return values


def snapshot(model: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(trainable values, maps) of the active adapter."""
    values = {name: p.detach().numpy().copy() for name, p in trainable_tensors(model).items()}
    return values, read_maps(model)


def naive_delta(
    x: np.ndarray,
    slot: int,
    config: DeMAConfig,
    values: dict[str, np.ndarray],
    maps: dict[str, Any],
) -> np.ndarray:
    """METHOD section 2 word by word, one row at a time, in float64."""
    here = f"slots.{slot}"
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        z = maps[f"{here}.map.down.weight"] @ row + maps[f"{here}.map.down.bias"]
        scores = values[f"{here}.gate.weight"] @ z + values[f"{here}.gate.bias"]
        if config.gate == "uniform":
            scores = np.zeros_like(scores)
        gate = np.exp(scores - scores.max())
        gate /= gate.sum()
        mixed = np.zeros(config.output_width)
        for index, weight in enumerate(gate):
            expert = f"{here}.experts.global.{index}"
            if config.inner == 0:  # Co-LoRA: P z + Q
                core = values[f"{expert}.up.weight"] @ z + values[f"{expert}.up.bias"]
                mixed += weight * core
                continue
            inner = values[f"{expert}.down.weight"] @ z + values[f"{expert}.down.bias"]
            if config.activation == "silu":
                inner = inner / (1 + np.exp(-inner))
            mixed += weight * (values[f"{expert}.up.weight"] @ inner)
        result[i] = maps[f"{here}.map.up.weight"] @ mixed
    return result.reshape(x.shape)


@torch.no_grad()
def naive_logits(
    bare: Any, ids: torch.Tensor, config: DeMAConfig, values: dict[str, Any], maps: dict[str, Any]
) -> torch.Tensor:
    """Logits of a bare model with the naive mixture added by forward hooks."""
    structure = find_structure(bare)
    where = [structure.mlps[b] for b in slot_blocks(config.slots, len(structure.mlps))]
    where.append(structure.final_norm)

    def hook_of(slot: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            x = output if slot == config.slots - 1 else inputs[0]
            added = naive_delta(x.cpu().numpy(), slot, config, values, maps)
            return output + torch.from_numpy(added).float().to(output)

        return hook

    handles = [
        bare.get_submodule(name).register_forward_hook(hook_of(slot))
        for slot, name in enumerate(where)
    ]
    try:
        return bare(ids.to(bare.device)).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode, float32."""
    was_training = model.training
    result = model.eval()(ids.to(model.device)).logits.float()
    model.train(was_training)
    return result


def save_base(folder: Path, family: str = "llama") -> Path:
    """Write a tiny model as an ordinary directory."""
    tiny_model(family).save_pretrained(folder)
    return folder
