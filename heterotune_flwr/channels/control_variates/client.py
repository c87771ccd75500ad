"""A client's control variate, for SCAFFOLD (arXiv 1910.06378): a term of its gradient, kept in its own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from heterotune_flwr.channels.client_half import ClientChannel
from heterotune_flwr.channels.limits import LARGEST, TYPICAL, bounded
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.tuning.optimizer import GradientTerm

_PREFIX = "control."


class Correction:
    """``c - c_i`` by the names of trained parameters, of their shapes (a :class:`.optimizer.GradientTerm`)."""

    def __init__(
        self, values: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter]
    ) -> None:
        self._values = {name: value.to(trained[name]) for name, value in values.items()}

    def add(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Add it to the gradients."""
        for name, value in self._values.items():
            gradient = trained[name].grad
            if gradient is not None:
                gradient.add_(value)


class Channel(ClientChannel):
    """The server's control variate ``c`` of a round and the client's own ``c_i``, which starts at zero."""

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Bound what is added to gradients."""
        bounded(asked.tensors, "the control variates", LARGEST, TYPICAL)

    @cached_property
    def own(self) -> Tensors:
        """``c_i``."""
        shapes = {_PREFIX + name: value.shape for name, value in self.asked.tensors.items()}
        kept = self.work.store.load(shapes, self.work.header.round)
        return {
            name: kept.get(_PREFIX + name, np.zeros_like(value))
            for name, value in self.asked.tensors.items()
        }

    def depends_on(self) -> Tensors:
        """``c_i``."""
        return self.own

    def gradients(self) -> Sequence[GradientTerm]:
        """``c - c_i``, for what is trained."""
        values = {
            name: torch.from_numpy(c - self.own[name]) for name, c in self.asked.tensors.items()
        }
        return [Correction(values, self.work.adapter.trained)]

    def keeps(self, deltas: Tensors, path_length: float) -> Tensors:
        """``c_i - c - delta / (sum of the steps' rates)`` (the paper's option II)."""
        return {
            _PREFIX + name: self.own[name] - c - deltas[name] / path_length
            for name, c in self.asked.tensors.items()
        }
