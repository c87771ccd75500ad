"""The exact softmax over a whole vocabulary that an output latent moves, without the unembedding's width.

The last slot adds ``U o`` to the state that enters the unembedding ``W``, so logits are ``base + E o`` with ``E = W U``
(V x r_out), and the loss's gradient for ``o`` is ``sum_v p_v E_v`` minus the targets' rows. Both come out of one pass
over the vocabulary, piece by piece in the cache (as attention does with keys, arXiv 2205.14135): nothing of the size of
a batch of logits is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Words of the vocabulary at a time.
_PIECE = 2048
#: Positions whose symbols' logits exist at once.
_AT_A_TIME = 64


def moments(base: Tensor, outputs: Tensor, effect: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of ``exp(base + E o)`` (S), and the mean row of ``effect`` under that softmax (S x r_out).

    ``base``: log-probabilities S x V (any float dtype); they are at most 0, so no maximum has to be taken out first.
    """
    total, rows = torch.zeros(len(base)), torch.zeros_like(outputs)
    for start in range(0, base.shape[1], _PIECE):
        piece = effect[start : start + _PIECE]
        weights = torch.addmm(base[:, start : start + _PIECE].float(), outputs, piece.T).exp_()
        total += weights.sum(1)
        rows.addmm_(weights, piece)
    return total.log(), rows / total[:, None]


class _SparseCrossEntropy(torch.autograd.Function):
    """``-sum_k t_k log p(id_k)`` at every position, for targets of few tokens."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, base: Tensor, effect: Tensor, ids: Tensor, shares: Tensor
    ) -> Tensor:
        normaliser, mean = moments(base, outputs, effect)
        rows = effect[ids]  # S x k x r_out
        logits = base.gather(1, ids).float() + torch.einsum("skr,sr->sk", rows, outputs)
        mass = shares.sum(1)
        ctx.save_for_backward(mass[:, None] * mean - torch.einsum("skr,sk->sr", rows, shares))
        return mass * normaliser - (shares * logits).sum(1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream[0][:, None] * gradient, None, None, None, None


def cross_entropy(
    outputs: Tensor, base: Tensor, effect: Tensor, ids: Tensor, shares: Tensor | None = None
) -> Tensor:
    """Loss in nats at every position (S): of one target each (``ids`` S), or of ``shares`` of k (both S x k)."""
    if shares is None:
        ids, shares = ids[:, None], torch.ones(len(ids), 1)
    loss: Tensor = _SparseCrossEntropy.apply(outputs, base, effect, ids, shares)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def likeliest(
    outputs: Tensor, base: Tensor, effect: Tensor, chosen: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The likeliest ``count`` of some tokens (ids ``chosen``) at every position: log-probabilities, places in it."""
    rows, logs, places = effect[chosen], [], []
    normaliser, _ = moments(base, outputs, effect)
    for start in range(0, len(outputs), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        logits = torch.addmm(base[part].index_select(1, chosen).float(), outputs[part], rows.T)
        best = logits.topk(count, dim=1)
        logs.append(best.values - normaliser[part, None])
        places.append(best.indices)
    return torch.cat(logs), torch.cat(places)
