"""DeMA models that *are* a LoRA on the unembedding plus a bias: a linear mixture at the last slot alone.

With ``z = D h + o`` and the mixture ``u = P z + q``, logits are ``W (h + U u)``: the change of W is ``(W U P) D`` and
the bias ``W U (P o + q)``. What channels add to labels that part at the prompt's end is linear in ``z`` too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heterotune_flwr.dema.access import active_adapter, slot_layers
from heterotune_flwr.export.low_rank import LowRank, sparse_rows
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.task import Task


def is_linear(adapter: AttachedAdapter, task: Task) -> bool:
    """Whether a model is a LoRA on its unembedding, exactly, whatever its numbers are."""
    method = adapter.method
    return (
        method.kind == "dema"
        and method.slots == 1
        and method.core_rank == 0
        and not method.views
        and (method.inner == 0 or method.activation == "linear")
        and (method.experts_global == 1 or method.gate == "uniform")
        and (task.trie is None or (len(task.trie.nodes) == 1 and task.scaling.softcap is None))
    )


@torch.no_grad()
def exact_change(adapter: AttachedAdapter, task: Task) -> LowRank:
    """The change of the unembedding that a linear model is, its frozen head included; see :func:`is_linear`."""
    name = active_adapter(adapter.model)
    layer: Any = slot_layers(adapter.model)[-1]
    head = layer.head(name)
    maps = layer.dema_maps[name]
    down, offset, up = (
        value.float() for value in (maps.down_weight, maps.down_bias, maps.up_weight)
    )
    experts = [_linear(expert) for expert in layer.experts(name)]
    weight = sum(w for w, _ in experts) / len(experts)
    bias = sum(b for _, b in experts) / len(experts)
    unembedding = adapter.backbone.model.get_output_embeddings().weight
    out = unembedding.float() @ up
    change = LowRank(weight @ down, out, out @ (weight @ offset + bias))
    if task.trie is None or head is None:
        return change
    # Logits are multiplied after the unembedding; what is added to them is not.
    extra = head.weight.float() / task.scaling.scale
    constant = (head.bias + head.prior).float() / task.scaling.scale + extra @ offset
    units = torch.eye(len(extra), device=extra.device)
    tokens = [task.trie.tokens[way[-1]] for way in task.trie.ways]
    rows = len(unembedding)
    assert change.bias is not None
    return LowRank(
        torch.cat([change.down, extra @ down]),
        torch.cat([change.up, sparse_rows(units, tokens, rows)], dim=1),
        change.bias + sparse_rows(constant[:, None], tokens, rows)[:, 0],
    )


def _linear(expert: Any) -> tuple[Tensor, Tensor]:
    """An expert without a bend as one matrix (r_out x r) and a constant (r_out)."""
    up = expert.up
    if expert.down is None:
        return up.weight.float(), up.bias.float()
    return (
        up.weight.float() @ expert.down.weight.float(),
        up.weight.float() @ expert.down.bias.float(),
    )
