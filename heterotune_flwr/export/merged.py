"""A plain transformers model folder: the weights that were used, as ordinary numbers, with low-rank changes added."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterotune_flwr.backbones.loading import Backbone, linear_sides
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.export.low_rank import Changes, head_name
from heterotune_flwr.tuning.lora import dense_weight


def write_merged(backbone: Backbone, changes: Changes, target: Path) -> None:
    """Write a bare backbone with changes of its linear layers as a folder that ``from_pretrained`` loads.

    Quantized layers become what they stand for, in bfloat16 (a backbone at ``fp32`` stays so). Where the unembedding
    changes and is the embedding's matrix, it becomes a matrix of its own; the embedding stays. ``changes``: by name of
    the layer in the backbone's model.

    Raises
    ------
    BackboneError
        A change has a bias and its layer none, so that no weight can hold it.

    """
    model = backbone.model
    head = head_name(model)
    for name, change in changes.items():
        layer = model.get_submodule(name)
        if change.bias is not None and getattr(layer, "bias", None) is None:
            raise BackboneError(f"{name} has no bias that the change's bias could be added to")
    dtype = torch.float32 if backbone.spec.bits == "fp32" else torch.bfloat16
    weights = _dense(model, changes, dtype)
    plain = _empty(model, untied=head in changes)
    plain.load_state_dict(
        {name: value for name, value in weights.items() if name in plain.state_dict()},
        assign=True,
    )
    if head not in changes:
        plain.tie_weights()
    plain.config.dtype = dtype
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.save_pretrained(target)
    backbone.tokenizer.save_pretrained(target)


def _empty(model: Any, untied: bool) -> Any:
    """A model of the same configuration without weights, to be filled."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        if untied:
            part.tie_word_embeddings = False
    with torch.device("meta"):
        return type(model)(config)


@torch.no_grad()
def _dense(model: Any, changes: Changes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight of a model as ordinary numbers, with the changes in them."""
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            weights[f"{name}.{key}"] = parameter.detach().cpu()
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                weights[f"{name}.{key}"] = buffer.detach().cpu()
        if linear_sides(module) is None:
            continue
        weight, change = dense_weight(module).detach().cpu(), changes.get(name)
        if change is not None:
            weight = weight.float() + change.up.float().cpu() @ change.down.float().cpu()
            if change.bias is not None:
                weights[f"{name}.bias"] = (
                    weights[f"{name}.bias"].float() + change.bias.float().cpu()
                )
        weights[f"{name}.weight"] = weight.T if hasattr(module, "nf") else weight
    return {name: _as(value, dtype) for name, value in weights.items()}


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous() if value.is_floating_point() else value
