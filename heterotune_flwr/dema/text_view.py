"""A second view of a text: the mean over its tokens of what enters the middle block.

The final state at the answer's position holds what a model would answer; halfway up, and over the whole text, lies what
the text is about. The two err differently (docs/method.md), so a shared discriminant may read both
(``method.text_view``).
The first token is left out: models park attention there (attention sinks, arXiv 2309.17453), whatever the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.config.schema import DataConfig
from heterotune_flwr.data.template import encode_prompt
from heterotune_flwr.dema.structure import find_structure

_BATCH_TOKENS = 2048


def middle_block(layers: int) -> int:
    """Index of the block whose inputs are read."""
    return min((layers + 1) // 2, layers - 1)


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass early)
    """A forward pass has reached the block it was run for."""


def entering(body: nn.Module, block: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What enters a block of a decoder (``B x T x d``); nothing above it is computed."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def text_mean(states: Tensor) -> Tensor:
    """Mean of one text's states (``T x d`` -> ``d``, float32), without the first where there is another."""
    return states[min(1, len(states) - 1) :].float().mean(dim=0)


@torch.no_grad()
def collect_text_states(
    backbone: Backbone, texts: Sequence[str], data: DataConfig
) -> NDArray[np.float32]:
    """One row per text (``n x d``), of the bare backbone."""
    structure = find_structure(backbone.model)
    body = backbone.model.get_submodule(structure.body) if structure.body else backbone.model
    block = backbone.model.get_submodule(f"{structure.blocks}.{middle_block(len(structure.mlps))}")
    encoded = [encode_prompt(backbone.tokenizer, data.prompt, t, data.max_length) for t in texts]
    rows = np.empty((len(texts), structure.hidden), np.float32)
    for batch in batches_by_length([len(ids) for ids in encoded], _BATCH_TOKENS):
        longest = max(len(encoded[i]) for i in batch)
        ids = torch.full((len(batch), longest), int(backbone.tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[row, : len(encoded[index])] = 1
        states = entering(body, block, ids.to(backbone.device), mask.to(backbone.device))
        for row, index in enumerate(batch):
            rows[index] = text_mean(states[row, : len(encoded[index])]).cpu().numpy()
    return rows
