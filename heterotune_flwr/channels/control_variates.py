"""A client's control variate, for SCAFFOLD (arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from heterotune_flwr.tuning.client_state import ClientStore

Tensors = dict[str, NDArray[np.float32]]

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


@dataclass(frozen=True)
class ClientControls:
    """The server's control variate ``c`` of a round and the client's own ``c_i``; both empty without SCAFFOLD."""

    server: Tensors
    own: Tensors

    @classmethod
    def of(cls, server: Tensors | None, store: ClientStore, round: int) -> ClientControls:
        """Bring together what the server sent and what the client kept; its own starts at zero."""
        if not server:
            return cls({}, {})
        kept = store.load({_PREFIX + name: value.shape for name, value in server.items()}, round)
        own = {name: kept.get(_PREFIX + name, np.zeros_like(v)) for name, v in server.items()}
        return cls(server, own)

    def corrections(self, trained: Mapping[str, nn.Parameter]) -> list[Correction]:
        """What is added to every local gradient: ``c - c_i``; nothing without SCAFFOLD."""
        values = {
            name: torch.from_numpy(self.server[name] - self.own[name]) for name in self.server
        }
        return [Correction(values, trained)] if values else []

    def after(self, deltas: Mapping[str, NDArray[np.float32]], path_length: float) -> Tensors:
        """``c_i - c - delta / (sum of the steps' rates)`` (the paper's option II), under the names it is kept by."""
        return {
            _PREFIX + name: self.own[name] - self.server[name] - deltas[name] / path_length
            for name in self.server
        }
