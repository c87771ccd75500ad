"""What a client does with predictions: it fits the federation's mean, and predicts for the others.

Of a closed label set here, on open text in :mod:`.token_client`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.channels.channel import Purpose
from heterotune_flwr.channels.client_half import ClientChannel, ClientWork
from heterotune_flwr.channels.predictions.loss import Distillation, predict
from heterotune_flwr.channels.predictions.own_texts import check_bounds, known_texts
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
    as_probabilities,
)
from heterotune_flwr.channels.predictions.token_client import TokenWork
from heterotune_flwr.channels.predictions.token_record import TOKENS
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.tuning.losses import LossTerm
from heterotune_flwr.tuning.states import Rows, make_rows
from heterotune_flwr.tuning.task import EncodedSet


class LabelWork(ClientChannel):
    """Label probabilities of a closed set.

    Raises
    ------
    ConfigError
        The task has no closed label set, or this client reads other texts than the server.

    """

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        super().__init__(asked, work)
        if work.task.kind != "labels":
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

    @cached_property
    def _encoded(self) -> EncodedSet:
        """All texts that are read."""
        task = self.work.task
        unknown = (task.labels or [""])[0]  # a public text has no label; encoding wants one
        return self.work.encode(
            task,
            ("anchors", self.request.digest),
            lambda: [Example(text, unknown) for text in self.texts],
        )

    def _rows(self, purpose: Purpose) -> Rows:
        """Their rows, with what channels add to the logits."""
        work = self.work
        offsets = work.logits(self._encoded, purpose)
        cache = work.config.train.cache_states
        return make_rows(work.adapter, self._encoded, cache, offsets=offsets)

    def losses(self) -> Sequence[LossTerm]:
        """Fit the federation's mean; nothing where nobody has predicted (ExchangeError: other labels)."""
        request, work = self.request, self.work
        if request.targets is None or request.is_empty:
            return ()
        values = as_probabilities(request.targets, request.count, len(work.task.labels or ()))
        targets = torch.from_numpy(values).to(work.task.backbone.device)
        chosen = self._drawn(request.count, work.header.round)
        return [Distillation(self._rows("fit"), chosen, targets, request.weight, request.batch)]

    def reply(self) -> Payload | None:
        """Predict on the next round's texts."""
        if not self.request.wanted:
            return None
        chosen = self._drawn(self.request.wanted, self.work.header.round + 1)
        return Said(predict(self.work.task, self._rows("predict"), chosen)).to_payload()

    def _drawn(self, count: int, round: int) -> list[int]:
        """The anchors of a round: out of the pool, or all of the list where they are more."""
        return round_anchors(max(self.request.pool, count), count, self.work.header.seed, round)


class Channel(ClientChannel):
    """Predictions of labels, or of symbols, as the server asks."""

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        super().__init__(asked, work)
        self._half = _half_of(asked)(asked, work)

    @classmethod
    def check(cls, asked: Payload) -> None:
        """As the half that is asked."""
        _half_of(asked).check(asked)

    def tests(self) -> bool:
        """As the half that is asked."""
        return self._half.tests()

    def losses(self) -> Sequence[LossTerm]:
        """As the half that is asked."""
        return self._half.losses()

    def reply(self) -> Payload | None:
        """As the half that is asked."""
        return self._half.reply()


def _half_of(asked: Payload) -> type[LabelWork] | type[TokenWork]:
    return TokenWork if TOKENS in asked.fields else LabelWork
