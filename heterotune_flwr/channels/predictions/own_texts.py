"""Public texts as a client reads them: the same as the server's, and no louder than a node lets them be."""

from __future__ import annotations

import functools

from heterotune_flwr.alignment.public_texts import (
    anchor_digest,
    load_anchors,
    other_anchors,
)
from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.channels.limits import within
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
