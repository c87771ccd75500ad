"""What the LoRA rivals share: factors by layer, ranks that differ between clients, dense changes.

A layer's change is ``scale * B A`` with ``scale = alpha / rank``, the same for all clients of a strategy (alpha is
taken in proportion to a client's rank, so that factors of different rank can be compared).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.dema.bank import RESIDUAL
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.directions import down_codec
from heterotune_flwr.exchange.packing import Tensors, round_trip
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate, Shapes
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.strategies.strategy import HeteroStrategy

Matrix = NDArray[np.float64]


class LoRAStrategy(HeteroStrategy):
    """A strategy whose clients train LoRA inside their model type; ``method.kind`` must be ``lora``."""

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        if self.method.kind != "lora":
            raise ConfigError(
                f"strategy {context.name} trains LoRA but method.kind is {self.method.kind!r}; "
                f"set strategies.{context.name}.method.kind=lora"
            )

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.method.lora_alpha / self.method.lora_rank

    def sent(self, client_id: str) -> Tensors:
        """The values a client started this round from: what it was sent, as the codec rounds it."""
        return round_trip(self.outgoing(client_id), down_codec(self.config.exchange))

    def trained(self, updates: Sequence[ClientUpdate]) -> list[Tensors]:
        """Every client's tensors after training, in the order of ``updates``."""
        values = []
        for update in updates:
            start = self.sent(update.client_id)
            values.append({name: start[name] + delta for name, delta in update.deltas.items()})
        return values


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    """``n_i / n``."""
    total = sum(update.examples for update in updates)
    return [update.examples / total for update in updates]


def layers(names: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """(layer, name of A, name of B) of every layer with LoRA factors among the tensors named."""
    for name in sorted(names):
        if name.startswith("lora.") and name.endswith(".A"):
            layer = name[: -len(".A")]
            yield layer, name, f"{layer}.B"


def product(tensors: Mapping[str, NDArray[np.float32]], a: str, b: str) -> Matrix:
    """``B A`` in float64, out x in."""
    return np.asarray(tensors[b].astype(np.float64) @ tensors[a].astype(np.float64))


class RankedLoRAStrategy(LoRAStrategy):
    """Clients of one type train LoRA of different rank: ``ranks`` in turn, in the order of their ids.

    The server holds factors of the largest rank; a client of rank r is sent the first r rows of A and columns of B.
    Without ``ranks`` everybody has ``method.lora_rank``.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    ranks
        LoRA ranks of a type's clients, in turn; null: ``method.lora_rank`` for all. [rank]

    """

    def __init__(self, context: StrategyContext, ranks: Sequence[int] | None = None) -> None:
        super().__init__(context)
        self.ranks = list(ranks or [self.method.lora_rank])
        largest = max(self.ranks)
        alpha = self.method.lora_alpha * largest / self.method.lora_rank
        self.method = replace(self.method, lora_rank=largest, lora_alpha=alpha)

    @classmethod
    def check_options(cls, options: Mapping[str, object]) -> None:
        """Refuse ranks that are none."""
        ranks = options.get("ranks")
        if ranks is None:
            return
        whole = isinstance(ranks, (list, tuple)) and all(type(rank) is int for rank in ranks)
        if not whole or not ranks or min(ranks) < 1:  # type: ignore[arg-type, call-overload]
            raise ConfigError(f"ranks is {ranks!r}; give a list of whole numbers above 0")

    def rank_of(self, client_id: str) -> int:
        """LoRA rank of a client."""
        members = self.roster.of_type(self.roster.clients[client_id].info.type_key)
        return self.ranks[members.index(client_id) % len(self.ranks)]

    def client_method(self, client_id: str) -> MethodConfig:
        """LoRA of the client's rank, at the same scale."""
        rank = self.rank_of(client_id)
        return replace(self.method, lora_rank=rank, lora_alpha=self.scale * rank)

    def client_shapes(self, client_id: str) -> Shapes:
        """Shapes at the client's rank."""
        rank = self.rank_of(client_id)
        shapes = dict(super().client_shapes(client_id))
        for _, a, b in layers(shapes):
            shapes[a], shapes[b] = (rank, shapes[a][1]), (shapes[b][0], rank)
        return shapes

    def outgoing(self, client_id: str) -> Tensors:
        """The first rows and columns of the server's factors."""
        rank, tensors = self.rank_of(client_id), super().outgoing(client_id)
        for _, a, b in layers(tensors):
            tensors[a], tensors[b] = tensors[a][:rank], tensors[b][:, :rank]
        return tensors

    @property
    def models_differ(self) -> bool:
        """Clients of different rank hold different models."""
        return len(set(self.ranks)) > 1 or super().models_differ


class ResidualLoRAStrategy(LoRAStrategy):
    """The server moves part of every layer's change into a dense matrix that all clients of a type hold.

    Only exact where the weights it stands beside are not quantized: merged into 4- or 8-bit weights most of a small
    change would be rounded away, and kept apart it takes as much memory as the 16-bit model that quantization was to
    avoid. So quantized types are refused. The dense change is sent whole, so that a client may miss rounds; a
    deployment where nobody does could send the round's factors instead.
    """

    own_server_step = "replaces its factors by closed forms, which a server optimizer would break"

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self.method = replace(self.method, lora_residual=True)

    def frozen(self, type_key: str, server_round: int) -> Collection[str]:
        """Hold the dense changes: the server alone moves them."""
        dense = [n for n in self.roster.shapes(type_key) if n.endswith(RESIDUAL)]
        return [*super().frozen(type_key, server_round), *dense]

    @classmethod
    def check_types(cls, bits: Mapping[str, str]) -> None:
        """Refuse quantized backbones."""
        for type_key, width in sorted(bits.items()):
            if width not in ("bf16", "fp16", "fp32", "auto"):
                raise ConfigError(
                    f"{cls.__name__} adds dense changes to the weights, which {type_key} keeps at {width}: they "
                    "would be rounded away, or take the memory of the 16-bit model; use bits bf16 or fp32, or "
                    "another strategy"
                )
