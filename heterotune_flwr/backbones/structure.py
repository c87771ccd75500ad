"""Finds the parts of a decoder-only model that DeMA attaches to, whatever the family calls them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from heterotune_flwr.errors import BackboneError

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe")
_NORM_NAMES = (
    "norm",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "ln_f",
    "norm_f",
)


@dataclass(frozen=True)
class DecoderStructure:
    """Module names (relative to the causal-LM model) of a decoder and its width."""

    body: str
    blocks: str
    mlps: tuple[str, ...]
    final_norm: str
    hidden: int


def text_config(model: nn.Module) -> Any:
    """The text part of a transformers configuration (multimodal models nest it)."""
    config = model.config
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def _kind(module: nn.Module) -> str:
    """Lower-case class name of a module, looking through adapters of PEFT."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return type(module).__name__.lower()


def _mlp_name(block: nn.Module) -> str | None:
    children = dict(block.named_children())
    for name in _MLP_NAMES:
        if name in children:
            return name
    return next((name for name, child in children.items() if "mlp" in _kind(child)), None)


def _blocks(model: nn.Module, layers: int) -> str:
    """Name of the list of decoder blocks: all with an MLP, inside the decoder if the model names one."""
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if getter is not None else None
    inside = {id(module) for module in decoder.modules()} if decoder is not None else None
    lists: list[tuple[str, nn.ModuleList]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and (inside is None or id(module) in inside)
    ]
    for name, module in lists:
        if all(_mlp_name(block) is not None for block in module):
            return name
    if lists:
        name, module = lists[0]
        children = ", ".join(child for child, _ in module[0].named_children())
        raise BackboneError(
            f"no MLP found in {name}.0 of {type(model).__name__} (children: {children}); name the "
            "blocks' MLPs and the final norm with mlp_modules and final_norm_module of a DeMAConfig (not in a run)"
        )
    raise BackboneError(
        f"{type(model).__name__} has no list of {layers} decoder blocks: DeMA needs a decoder-only model"
    )


def _final_norm(body: nn.Module, where: str) -> str:
    norms = [
        name
        for name, child in body.named_children()
        if "norm" in _kind(child) and "embed" not in name
    ]
    for name in (*_NORM_NAMES, *reversed(norms)):
        if name in norms:
            return name
    raise BackboneError(f"no final norm found in {where}; name it with final_norm_module")


def find_structure(model: nn.Module) -> DecoderStructure:
    """The decoder blocks, their MLPs and the final norm of a causal-LM model.

    Works on a bare model and on one that carries adapters; names are those of the model given.

    Raises BackboneError: the model is not a decoder with one MLP per block and a final norm.
    """
    config = text_config(model)
    blocks_name = _blocks(model, int(config.num_hidden_layers))
    body_name = blocks_name.rpartition(".")[0]
    body = model.get_submodule(body_name)
    prefix = f"{body_name}." if body_name else ""
    blocks = model.get_submodule(blocks_name)
    mlps = tuple(
        f"{blocks_name}.{index}.{_mlp_name(block)}" for index, block in blocks.named_children()
    )
    return DecoderStructure(
        body=body_name,
        blocks=blocks_name,
        mlps=mlps,
        final_norm=prefix + _final_norm(body, body_name or type(model).__name__),
        hidden=int(config.hidden_size),
    )


def slot_blocks(slots: int, layers: int) -> list[int]:
    """Block index of every slot but the last: equal relative depth, ``ceil(k L / K) - 1``.

    Raises BackboneError: there are more slots than blocks.
    """
    if slots > layers:
        raise BackboneError(
            f"method.slots is {slots} but the backbone has {layers} blocks; use at most {layers} slots"
        )
    return [math.ceil(k * layers / slots) - 1 for k in range(1, slots)]
