"""Error feedback: what a lossy codec dropped of an update is added to the client's next one.

With ``C`` the codec, ``d_t`` the local change of round t and ``e_0 = 0``::

    p_t = d_t + e_{t-1}        sent: C(p_t)        e_t = p_t - C(p_t)

Seide et al. 2014 (1-bit SGD, Interspeech); Karimireddy et al. 2019 (arXiv 1901.09847, algorithm 1): without it, a codec
whose errors point one way (``topk`` always drops the small ones) keeps the run from converging.

The residual ``e`` never leaves the client. It has files of its own beside the client's state, with the same rule: the
state before a round is kept, so that a round trained again sends the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import find_codec
from heterotune_flwr.exchange.directions import exact_codec, up_codec
from heterotune_flwr.exchange.packing import Tensors, round_trip
from heterotune_flwr.schema import ExchangeConfig
from heterotune_flwr.tuning.client_state import ClientStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feedback:
    """The residual of one client in one experiment.

    Attributes
    ----------
    codec
        What updates are sent with.
    store
        Files of the residual; None where there is none to keep (an exact codec, or it is switched off).

    """

    codec: str
    store: ClientStore | None

    @classmethod
    def of(cls, exchange: ExchangeConfig, store: ClientStore, once: bool = False) -> Feedback:
        """For a run's settings, beside the client's own state in ``store``.

        ``once``: no later update could bring what the codec drops of this one, so it is sent exactly.
        """
        if once:
            return cls(exact_codec(exchange), None)
        codec = up_codec(exchange)
        active = exchange.error_feedback and find_codec(codec).lossy
        return cls(codec, store.part("residual") if active else None)

    def add(
        self,
        deltas: Mapping[str, NDArray[np.float32]],
        shapes: Mapping[str, tuple[int, ...]],
        round: int,
    ) -> Tensors:
        """What to send for a round's changes; keeps what the codec will drop of it.

        Parameters
        ----------
        deltas
            Changes of the tensors that are sent; no other tensor gets a residual.
        shapes
            Of all tensors of the client's adapter. A residual waits while its tensor is not trained (RoLoRA's other
            factor), and is dropped where the tensor is gone or has another shape.
        round
            The round trained.

        """
        if self.store is None or not deltas:
            return dict(deltas)
        pending = self._pending(self.store, shapes, round)
        due = {name: d + pending.pop(name) if name in pending else d for name, d in deltas.items()}
        seen = round_trip(due, self.codec)
        with np.errstate(invalid="ignore"):
            left = {name: due[name] - seen[name] for name in due}
        # A number that is not finite is for the update gate, once; carried on it would never end.
        fresh = {name: np.where(np.isfinite(e), e, np.float32(0)) for name, e in left.items()}
        self.store.save({**pending, **fresh}, round)
        return due

    @staticmethod
    def _pending(store: ClientStore, shapes: Mapping[str, tuple[int, ...]], round: int) -> Tensors:
        try:
            return store.load(shapes, round)
        except ExchangeError as error:  # another adapter's, or a damaged file: only a residual
            log.warning("%s; its residual starts anew", error)
            store.clear()
            return {}
