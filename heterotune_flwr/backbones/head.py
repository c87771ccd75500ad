"""What a family does to its logits before and after the unembedding, measured on the model itself.

Losses and labels are read off final states by the unembedding alone, without the model's own code around it. So that
they are the model's own, that code is asked once, when a backbone is loaded: in one pass over two tokens the
unembedding gives a known ramp in the place of logits, and what the model makes of the ramp is compared with a factor
and a soft cap. Names of families or configuration keys play no part (Granite divides by ``logits_scaling``,
HyperCLOVA X multiplies by it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.backbones.structure import find_structure

#: Where a soft cap still does nothing, and where nothing else is left of the logits.
_SMALL, _LARGE = 2.0**-10, 2.0**20
#: Logits that real models give.
_RANGE = 64.0
#: bfloat16 rounds by up to 0.4 %.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class HeadScaling:
    """What some families do to logits after the unembedding: multiply, then soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Scale logits of any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@torch.no_grad()
def measured_scaling(model: Any) -> HeadScaling:
    """Measure the scaling of a causal LM's logits; costs one forward pass of two tokens.

    Raises ValueError: its logits are not the unembedding of its final states, scaled and capped: says what is in the
    way; BackboneError: the model has no decoder structure.
    """
    structure = find_structure(model)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError("it has no unembedding")
    seen: dict[str, Tensor] = {}

    def ramp(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["read"] = inputs[0]
        seen["logits"] = output
        values = torch.linspace(-_RANGE, _RANGE, output.shape[-1], device=output.device)
        values[0], values[-1] = _SMALL, _LARGE
        seen["ramp"] = values
        return values.expand(output.shape).clone()

    def state(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found = getattr(output, "last_hidden_state", output)
            seen[name] = found[0] if isinstance(found, tuple) else found

        return keep

    norm, body = model.get_submodule(structure.final_norm), model.get_submodule(structure.body)
    handles = [
        norm.register_forward_hook(state("normed")),
        body.register_forward_hook(state("final")),
        head.register_forward_hook(ramp),
    ]
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[rows // 3, rows // 2]], device=head.weight.device)
    try:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not {"read", "normed", "final"} <= seen.keys():
        raise ValueError("its own pass does not use its final norm and its unembedding")
    if not _close(seen["final"], seen["normed"]):
        raise ValueError("its final states are not what its final norm returns")
    return _fitted(_factor(seen, head), seen["ramp"], output.logits[0, -1].float())


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their dtype."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    return torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.std()))


def _factor(seen: dict[str, Tensor], head: nn.Module) -> float:
    """What states are multiplied by before the unembedding, which must be a plain matrix."""
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(f"its unembedding is {type(head).__name__}, no plain matrix")
    weight, bias, read = head.weight, getattr(head, "bias", None), seen["read"].float()
    part = functional.linear(read, weight[:64].float(), None if bias is None else bias[:64].float())
    if not _close(seen["logits"][..., :64], part):
        raise ValueError(f"its unembedding {type(head).__name__} does more than multiply")
    final = seen["final"].float()
    if read.shape != final.shape or _close(read, final):
        factor = 1.0
    else:
        factor = float((read * final).sum() / final.square().sum())
    if (
        read.shape != final.shape
        or not _close(read, factor * final)
        or (bias is not None and factor != 1.0)
    ):
        raise ValueError("its unembedding reads something else than its final states")
    return factor


def _fitted(factor: float, ramp: Tensor, logits: Tensor) -> HeadScaling:
    """Find the factor and the cap that make ``logits`` (V) of the ``ramp`` (V)."""
    if logits.shape != ramp.shape or not logits.isfinite().all():
        raise ValueError("its logits are no function of its unembedding's, number by number")
    scale, top = float(logits[0] / ramp[0]), float(logits[-1])
    found = HeadScaling(scale, top if abs(top) < 0.5 * abs(scale) * _LARGE else None)
    if scale <= 0 or not torch.allclose(found(ramp), logits, rtol=_TOLERANCE, atol=1e-3):
        raise ValueError("it changes its logits by more than a factor and a soft cap")
    return HeadScaling(factor * scale, found.softcap)
