"""What a strategy's YAML entry says of ``predictions``."""

from __future__ import annotations

from dataclasses import dataclass

from heterotune_flwr.channels.channel import POOL_OVER
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import option


@dataclass(frozen=True)
class PredictionOptions:
    """Options of a strategy's ``predictions``: what clients say of public texts, and all learn."""

    anchors: int = option(
        256,
        "public texts a round is about, C bytes each way per client-round; on open text: prompts [texts]",
        least=1,
    )
    pool: int = option(
        1024,
        "they are drawn from so many, the first of alignment.anchors; clients keep their frozen states [texts]",
        least=10,
    )
    weight: float = option(1.0, "of their loss beside the loss on own examples [factor]", least=0)
    agreement_power: float = option(
        1.0,
        "a client's share is its agreement with the others to this power: its predictions' correlation with the mean "
        "of the other clients'; 0: all have the same [power]",
        least=0,
        most=50,
    )
    entropy_power: float = option(
        1.0,
        "on each text a client's share is multiplied by exp(-entropy_power x entropy of what it predicts there): who "
        "knows speaks. 0: no difference; at 1 the surest counts at most C times as much as one without an idea [power]",
        least=0,
        most=50,
    )
    balance: int = option(
        5,
        "rounds of Sinkhorn's algorithm that make labels equally frequent; 0: none [rounds]",
        least=0,
    )
    batch: int = option(
        0,
        "public texts in every training step; 0: as many as examples (train.batch_size) [texts]",
        least=0,
    )
    pool_over: str = option(
        "all",
        "over whom is pooled for a client: all, or its own type, where nothing crosses types",
        choices=POOL_OVER,
    )
    guest_anchors: int = option(
        0,
        "where there are guests: texts everybody predicts on in the last round, for them to learn from; 0: as many as "
        "pool [texts]",
        least=0,
    )
    guest_steps: int = option(
        480, "on these texts, that guests take after the last round [steps]", least=1
    )
    answers_by: str = option(
        "bare",
        "who writes, on open text, the answers to public prompts at whose positions all predict: a bare model, or a "
        "client's trained one, where its owner allows it",
        choices=("bare", "client"),
    )

    def __post_init__(self) -> None:
        if self.anchors > self.pool:
            raise ConfigError(f"anchors is {self.anchors}, more than the {self.pool} of pool")
