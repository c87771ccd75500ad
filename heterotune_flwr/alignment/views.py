"""A second view of a text: the means over its tokens of what enters the first block and of what enters the middle one.

The final state at the answer's position holds what a model would answer. Halfway up, and over the whole text, lies what
the text is about, and before the first block which words stand in it. All of them err differently (docs/method.md), so
a shared discriminant may read them besides (``method.text_view``).
The first token is left out: models park attention there (attention sinks, arXiv 2309.17453), whatever the text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def blocks_read(layers: int) -> tuple[int, int]:
    """Indices of the blocks whose inputs are read: the first, and the middle one."""
    return 0, min((layers + 1) // 2, layers - 1)


class _Reached(Exception):  # noqa: N818 (no error: it ends a pass early)
    """A forward pass has reached the block it was run for."""


def entering(
    body: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, mask: Tensor
) -> list[Tensor]:
    """What enters some blocks of a decoder, in rising order (``B x T x d`` each); nothing above them is computed."""
    seen: list[Tensor] = []

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if len(seen) == len(blocks):
            raise _Reached

    hooks = [block.register_forward_pre_hook(read, with_kwargs=True) for block in blocks]
    try:
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def text_mean(states: Sequence[Tensor]) -> Tensor:
    """Means of one text's states at some blocks (``T x d`` each), one after the other (float32).

    Without the first token's where there is another.
    """
    return torch.cat([part[min(1, len(part) - 1) :].float().mean(dim=0) for part in states])
