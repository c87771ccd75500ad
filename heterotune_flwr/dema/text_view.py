"""A second view of a text: the mean over its tokens of what enters the middle block.

The final state at the answer's position holds what a model would answer; halfway up, and over the whole text, lies what
the text is about. The two err differently (docs/method.md), so a shared discriminant may read both
(``method.text_view``).
The first token is left out: models park attention there (attention sinks, arXiv 2309.17453), whatever the text is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
