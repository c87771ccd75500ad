"""The frozen head: what a federation adds to the labels' logits, as part of an adapter for a closed label set.

With ``z`` the latents of the *bare* backbone on a prompt (of the last slot, then of the head's views), label c gets
``W_c z + b_c + prior_c``. Where and when it does is :mod:`.label_logits`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.backbones.views import VIEWS
from heterotune_flwr.dema.config import DeMAConfig


class LabelHead(nn.Module):
    """Frozen numbers of one adapter's head, as persistent buffers; zeros until they are loaded.

    ``weight`` (C x places r), ``bias`` (C), ``prior`` (C: the owner's own label frequencies), and for each view the map
    ``{view}_weight`` (r x parts d), ``{view}_bias`` (r).
    """

    weight: Tensor
    bias: Tensor
    prior: Tensor

    def __init__(self, hidden: int, config: DeMAConfig) -> None:
        super().__init__()
        classes, latent = len(config.head_labels or ()), config.latent
        shapes = {
            "weight": (classes, latent * (1 + len(config.head_views))),
            "bias": (classes,),
            "prior": (classes,),
        }
        for view in config.head_views:
            shapes[f"{view}_weight"] = (latent, VIEWS[view].parts * hidden)
            shapes[f"{view}_bias"] = (latent,)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    @property
    def reads(self) -> bool:
        """Whether anything depends on the text."""
        return bool(self.weight.any())

    def view_latents(self, view: str, states: Tensor) -> Tensor:
        """What a view of texts ``N x parts d`` is in its latents, ``N x r``."""
        weight, bias = (
            cast(Tensor, getattr(self, f"{view}_{part}")) for part in ("weight", "bias")
        )
        return functional.linear(states.float(), weight.float(), bias.float())

    def offsets(self, latents: Tensor | None, rows: int) -> Tensor:
        """What is added to the labels' logits (``rows`` x C, float32) for latents ``rows x places r``."""
        if latents is None:
            found = self.bias.float().expand(rows, -1)
        else:
            found = functional.linear(latents, self.weight.float(), self.bias.float())
        return found + self.prior.float()
