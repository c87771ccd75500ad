"""The bank: names, shapes and first values of everything a client may train (numpy only).

Names are the contract between server and client. For DeMA (our definition, docs/method.md)::

    slots.{k}.experts.global.{e}.down.weight   q x r       N_e
    slots.{k}.experts.global.{e}.down.bias     q           b_e
    slots.{k}.experts.global.{e}.up.weight     r_out x q   P_e
    slots.{k}.gate.weight                      E x r       G
    slots.{k}.gate.bias                        E           c

    cores.{module}.R                           c x c       (``method.core_rank``; or ``A``, ``B``: ``core_kind``)

Without an inner layer (q = 0, Co-LoRA's P and Q) an expert is ``up.weight`` (r_out x r) and ``up.bias`` (r_out). For
LoRA, with a core or a dense change where a rival asks for it::

    lora.{module}.A                            rank x in
    lora.{module}.B                            out x rank
    lora.{module}.R                            rank x rank, instead of A and B
    lora.{module}.residual                     out x in, never trained

For slices of a whole model (:mod:`heterotune_flwr.tuning.submodel`), changes of its weights::

    sub.{module}                               the weight's shape, attention layers by key-value group
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.seeds import generator

#: How the names of dense changes end.
RESIDUAL = ".residual"
Part = Literal["expert", "gate", "core", "lora", "sub"]
#: How a name begins -> part, for what has no slots.
_WITHOUT_SLOTS: Mapping[str, Part] = {"lora": "lora", "cores": "core", "sub": "sub"}


class BankSizes(Protocol):
    """What fixes a bank's shapes: a run's ``method`` section or a ``DeMAConfig``."""

    slots: int
    latent: int
    inner: int
    experts_global: int


def bank_shapes(method: BankSizes, output: int) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of a client's DeMA tensors; ``output`` is r_out."""
    shapes: dict[str, tuple[int, ...]] = {}
    count, r, q = method.experts_global, method.latent, method.inner
    for slot in range(method.slots):
        for expert in range(count):
            name = f"slots.{slot}.experts.global.{expert}"
            if q == 0:
                shapes[f"{name}.up.weight"] = (output, r)
                shapes[f"{name}.up.bias"] = (output,)
                continue
            shapes[f"{name}.down.weight"] = (q, r)
            shapes[f"{name}.down.bias"] = (q,)
            shapes[f"{name}.up.weight"] = (output, q)
        shapes[f"slots.{slot}.gate.weight"] = (count, r)
        shapes[f"slots.{slot}.gate.bias"] = (count,)
    return shapes


def part_of(name: str) -> Part:
    """What a tensor belongs to, by its canonical name (ValueError: it is none)."""
    parts = name.split(".")
    if parts[0] in _WITHOUT_SLOTS:
        return _WITHOUT_SLOTS[parts[0]]
    if parts[0] == "slots":
        if parts[2:3] == ["gate"]:
            return "gate"
        if parts[2:4] == ["experts", "global"]:
            return "expert"
    raise ValueError(f"{name!r} is not the name of a trainable tensor")


def slot_of(name: str) -> int:
    """Slot index of a canonical DeMA name; 0 for LoRA and cores, which have no slots."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "slots" else 0


def initial_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, NDArray[np.float32]]:
    """First values, equal on server and client: a function of (seed, name, shape) alone.

    Projections *into* a bottleneck (``down.weight``, LoRA ``A``) are uniform with standard deviation
    ``1/sqrt(fan_in)`` and differ per expert; everything else is zero, so that a run starts
    at exactly the backbone.
    """
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        if name.endswith((".down.weight", ".A")):
            bound = math.sqrt(3.0 / shape[1])
            drawn = generator(seed, name).uniform(-bound, bound, size=shape)
            values[name] = drawn.astype(np.float32)
        else:
            values[name] = np.zeros(shape, dtype=np.float32)
    return values
