"""Finds the parts of a decoder-only model that DeMA attaches to, whatever the family calls them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from heterotune_flwr.errors import BackboneError

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe")


@dataclass(frozen=True)
class DecoderStructure:
    """Module names (relative to the causal-LM model) of a decoder and its width."""

    body: str
    blocks: str
    mlps: tuple[str, ...]
    final_norm: str
    hidden: int


def text_config(model: nn.Module) -> object:
    """The text part of a transformers configuration (multimodal models nest it)."""
    config = model.config
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def _blocks(model: nn.Module, layers: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name, module
    raise BackboneError(
        f"{type(model).__name__} has no list of {layers} decoder blocks: DeMA needs a decoder-only model"
    )


def _mlp_name(block: nn.Module, where: str) -> str:
    children = dict(block.named_children())
    for name in _MLP_NAMES:
        if name in children:
            return name
    for name, child in children.items():
        if "mlp" in type(child).__name__.lower():
            return name
    raise BackboneError(
        f"no MLP found in {where} (children: {', '.join(children)}); name them with mlp_modules"
    )


def _final_norm(body: nn.Module, where: str) -> str:
    for name, child in body.named_children():
        kind = type(child).__name__.lower()
        if "norm" in kind and "embed" not in name:
            return name
    raise BackboneError(f"no final norm found in {where}; name it with final_norm_module")


def find_structure(model: nn.Module) -> DecoderStructure:
    """The decoder blocks, their MLPs and the final norm of a causal-LM model.

    Raises
    ------
    BackboneError
        The model is not a decoder with one MLP per block and a final norm.

    """
    config = text_config(model)
    layers = int(config.num_hidden_layers)  # type: ignore[attr-defined]
    blocks_name, blocks = _blocks(model, layers)
    body_name = blocks_name.rpartition(".")[0]
    body = model.get_submodule(body_name)
    prefix = f"{body_name}." if body_name else ""
    mlps = tuple(
        f"{blocks_name}.{index}.{_mlp_name(block, f'{blocks_name}.{index}')}"
        for index, block in enumerate(blocks)
    )
    return DecoderStructure(
        body=body_name,
        blocks=blocks_name,
        mlps=mlps,
        final_norm=prefix + _final_norm(body, body_name or type(model).__name__),
        hidden=int(config.hidden_size),  # type: ignore[attr-defined]
    )


def slot_blocks(slots: int, layers: int) -> list[int]:
    """Block index of every slot but the last: equal relative depth, ``ceil(k L / K) - 1``.

    Raises
    ------
    BackboneError
        There are more slots than blocks.

    """
    if slots > layers:
        raise BackboneError(
            f"method.slots is {slots} but the backbone has {layers} blocks; use at most {layers} slots"
        )
    return [math.ceil(k * layers / slots) - 1 for k in range(1, slots)]
