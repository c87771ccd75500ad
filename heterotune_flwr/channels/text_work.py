"""A client's work on public texts: the same texts as the server's, and which of them a round is about."""

from __future__ import annotations

import functools

from heterotune_flwr.alignment.public_texts import (
    anchor_digest,
    load_anchors,
    other_anchors,
    round_anchors,
)
from heterotune_flwr.channels.client_half import ClientChannel, ClientWork
from heterotune_flwr.channels.limits import within
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import AlignmentConfig

_MOST_WEIGHT, _MOST_BATCH = 100.0, 4096


@functools.lru_cache(maxsize=4)
def anchor_texts(anchors: str, count: int) -> list[str]:
    """As :func:`.load_anchors`, read once per process."""
    return load_anchors(AlignmentConfig(anchors=anchors, count=count))


def known_texts(work: ClientWork, count: int, digest: str) -> list[str]:
    """The first public texts; ConfigError where this client's are not the server's."""
    alignment = work.node.alignment(work.config)
    texts = anchor_texts(alignment.anchors, count)
    if len(texts) < count or anchor_digest(texts) != digest:
        raise other_anchors()
    return texts


def check_bounds(weight: float, batch: int) -> None:
    """Bound how much a client learns from others (RefusedByNodeError)."""
    within("the weight of what others know", weight, 0.0, _MOST_WEIGHT)
    within("the public texts of a step", batch, 0, _MOST_BATCH)


class TextWork(ClientChannel):
    """The client's half of a channel about public texts.

    Raises
    ------
    ConfigError
        The task is another one than the channel's, or this client reads other texts than the server.

    """

    #: Of which kind the task must be: ``labels`` or ``tokens``.
    kind: str

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        super().__init__(asked, work)
        if work.task.kind != self.kind:
            raise ConfigError.plain(
                "predictions of labels need a closed label set (data.labels, train.loss)"
            )
        self.request = DistillationRequest.from_payload(asked)
        self.texts = known_texts(work, self.request.extent, self.request.digest)

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Bound how much a client learns from others."""
        request = DistillationRequest.from_payload(asked)
        check_bounds(request.weight, request.batch)

    def drawn(self, count: int, round: int) -> list[int]:
        """The anchors of a round: out of the pool, or all of the list where they are more."""
        return round_anchors(max(self.request.pool, count), count, self.work.header.seed, round)
