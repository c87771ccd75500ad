"""A client's work on public texts: the same texts as the server's, and which of them a round is about."""

from __future__ import annotations

import functools

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors, round_anchors
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
                "answers on anchors need an open-text task, predictions a closed label set (data.labels, train.loss)"
            )
        self.request = DistillationRequest.from_payload(asked)
        self.texts = self._known_texts()

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Bound how much a client learns from others."""
        request = DistillationRequest.from_payload(asked)
        within("the weight of what others know", request.weight, 0.0, _MOST_WEIGHT)
        within("the public texts of a step", request.batch, 0, _MOST_BATCH)

    def _known_texts(self) -> list[str]:
        """The anchors; ConfigError where this client's are not the server's."""
        alignment, request = self.work.node.alignment(self.work.config), self.request
        texts = anchor_texts(alignment.anchors, request.extent)
        if len(texts) < request.extent or anchor_digest(texts) != request.digest:
            raise ConfigError.plain(
                "the anchors here are not those of the server; they must be the same texts in the same order "
                "(alignment.anchors, anchors in a node's settings)"
            )
        return texts

    def drawn(self, count: int, round: int) -> list[int]:
        """The anchors of a round: out of the pool, or all of the list where they are more."""
        return round_anchors(max(self.request.pool, count), count, self.work.header.seed, round)
