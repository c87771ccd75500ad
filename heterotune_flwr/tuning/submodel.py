"""A slice of a whole LLaMA as a small model of its own: what HeteroFL and FedRolex train on a client.

A slice of width w keeps w of the hidden channels, of every block's MLP units and key-value groups (whole, with their
query heads, so that rotary positions stay right), as :mod:`heterotune_flwr.exchange.slices` says; all of the depth and
vocabulary. What is trained, float32, are *changes* of the sliced weights, zero at first: so the server needs no model,
and the mean of changes is the change of the mean. Attention weights have an axis for the groups::

    sub.{block}.self_attn.q_proj                groups x (heads per group * head) x hidden
    sub.{block}.self_attn.{k,v}_proj            groups x head x hidden
    sub.{block}.self_attn.o_proj                hidden x groups x (heads per group * head)
    sub.{any other module}                      the weight's own shape (norms too)

With ``method.sub_scaler`` the output of every linear layer of a block is divided by w, as HeteroFL's Scaler does: a sum
over fewer inputs keeps its size. Ours: it acts in training *and* in tests, because a client is tested on its slice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.slices import as_fraction, open_mesh, sliced_sizes
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.task import Task


def small_config(config: Any, width: float, name: str) -> Any:
    """The parent's configuration at a width (ConfigError as :func:`.slices.sliced_sizes`)."""
    small = type(config).from_dict(config.to_dict())
    for key, size in sliced_sizes(config.to_dict(), width, name).items():
        setattr(small, key, size)
    small.head_dim = config.head_dim  # heads stay whole
    return small


def _check_parent(backbone: Backbone) -> None:
    model, name = backbone.model, backbone.type_key
    if model.config.model_type != "llama" or getattr(model, "is_quantized", False):
        raise ConfigError.plain(
            f"sub-models can be cut out of LLaMA backbones at bf16 or fp32 only; {name} is {model.config.model_type!r}"
        )
    biased = [n for n, module in model.named_modules() if getattr(module, "bias", None) is not None]
    if biased:
        raise ConfigError.plain(
            f"sub-models of backbones with biases are not built; {name} has one in {biased[0]}"
        )


def by_group(name: str, shape: torch.Size, groups: int) -> tuple[int, ...]:
    """Canonical shape of a weight: attention layers with an axis for the key-value groups."""
    if name.endswith((".q_proj", ".k_proj", ".v_proj")):
        return (groups, shape[0] // groups, shape[1])
    if name.endswith(".o_proj"):
        return (shape[0], groups, shape[1] // groups)
    return tuple(shape)


class _Changed(nn.Module):
    """A weight as base plus a trained change of the canonical shape."""

    base: Tensor

    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)

    def forward(self, change: Tensor) -> Tensor:
        """The weight itself."""
        return self.base + change.reshape(self.base.shape)


def _scale(width: Fraction) -> Any:
    factor = float(1 / width)
    return lambda _module, _inputs, output: output * factor


def cut(backbone: Backbone, method: MethodConfig) -> tuple[Backbone, dict[str, nn.Parameter]]:
    """Cut ``method``'s slice out of a backbone, which stays as it is.

    Returns
    -------
    The backbone with the slice in its model's place, and the trained changes by canonical name; their values are
    zero.

    Raises
    ------
    ConfigError
        The backbone is quantized or no LLaMA, or the width cuts a head.

    """
    _check_parent(backbone)
    parent, device = backbone.model, backbone.device
    config = small_config(parent.config, method.sub_width, backbone.type_key)
    with torch.random.fork_rng(devices=[]):  # its random first values are overwritten
        model = type(parent)(config).float()
    weights = {
        name: module.weight for name, module in parent.named_modules() if _has_weight(module)
    }
    tied = bool(config.tie_word_embeddings)
    parameters: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not _has_weight(module) or (tied and name == "lm_head"):
            continue
        shape = by_group(name, module.weight.shape, config.num_key_value_heads)
        whole = by_group(name, weights[name].shape, parent.config.num_key_value_heads)
        mesh = [torch.from_numpy(axis) for axis in open_mesh(whole, shape, method.sub_window)]
        base = weights[name].detach().cpu().reshape(whole)[tuple(mesh)].float()
        parameters[f"sub.{name}"] = _trained(module, base.reshape(module.weight.shape), shape)
        if method.sub_scaler and ".layers." in name and isinstance(module, nn.Linear):
            module.register_forward_hook(_scale(as_fraction(method.sub_width)))
    if tied:
        embedding = parameters["sub.model.embed_tokens"]
        head = model.get_output_embeddings()
        head.weight = embedding
        around = _Changed(model.get_input_embeddings().parametrizations.weight[0].base)
        parametrize.register_parametrization(head, "weight", around, unsafe=True)
    model.to(device).eval()
    own = dataclasses.replace(backbone, model=model, hidden=int(config.hidden_size))
    return own, parameters


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _trained(module: nn.Module, base: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """Replace a module's weight by ``base`` and a change of zeros, which is returned."""
    change = nn.Parameter(torch.zeros(shape))
    module.weight = change
    parametrize.register_parametrization(module, "weight", _Changed(base), unsafe=True)
    return change


@dataclass(frozen=True, eq=False)
class SliceTask(Task):
    """The task where the unembedding is trained too: label rows are read off it anew, with gradients."""

    @classmethod
    def of(cls, task: Task, backbone: Backbone) -> SliceTask:
        """A task on the slice that ``backbone`` holds."""
        fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
        return cls(**{**fields, "backbone": backbone, "rows_weight": None})

    def label_rows(self) -> tuple[Tensor, Tensor | None]:
        """See :meth:`.Task.label_rows`; a slice has no biases."""
        assert self.trie is not None
        return self.backbone.model.get_output_embeddings().weight[self.trie.tokens].float(), None

    def losses(
        self, states: Tensor, targets: Tensor, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`.Task.losses`; open text too gives the unembedding its gradient."""
        if self.kind == "labels":
            return super().losses(states, targets, prior)
        parts = [self.token_losses(*chunk) for chunk in self.chunks(states, targets)]
        return torch.cat([loss for loss, _ in parts]), torch.cat([right for _, right in parts])
