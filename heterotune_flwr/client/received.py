"""A client's half of sending only what changed: the last tensors received, kept beside its state.

One file per client and experiment, replaced whole, without waiting for the disk: after a crash it is old, torn or gone,
which the digest in the request brings to light, and the server sends everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.storage import load_tensors, save_tensors
from heterotune_flwr.protocol.cached import CachedRef, joint_digest, tensor_keys
from heterotune_flwr.protocol.messages import EvaluateRequest, TrainRequest
from heterotune_flwr.protocol.wire import ERROR_TENSORS_MISSING, RemoteError
from heterotune_flwr.schema import ExchangeConfig
from heterotune_flwr.tuning.client_state import ClientStore

log = logging.getLogger(__name__)

Request = TypeVar("Request", bound=TrainRequest | EvaluateRequest)


class TensorCache:
    """The last tensors a server sent to a client in an experiment."""

    def __init__(self, path: Path, active: bool) -> None:
        self._path = path
        self._active = active

    @classmethod
    def of(cls, store: ClientStore, exchange: ExchangeConfig) -> TensorCache:
        """Beside the files of ``store``; keeps nothing where ``exchange.resend`` is ``always``."""
        return cls(store.part("received").path, exchange.resend == "changed")

    def complete(self, request: Request) -> tuple[Request, str]:
        """Give a request the tensors it only names, and keep all of them for the next one.

        Returns
        -------
        The request as if everything had been sent, and the digest that confirms what is kept (empty: nothing is).

        Raises
        ------
        RemoteError
            ``tensors_missing``: what the request names is not here as the server has it.

        """
        tensors = {**self._held(request.cached), **request.tensors}
        keys = tensor_keys(tensors) if self._active else {}
        if request.tensors and keys and not self._keep(tensors):
            keys = {}
        complete = replace(request, tensors=tensors, cached=CachedRef())
        return complete, joint_digest(keys) if keys else ""

    def _held(self, held: CachedRef) -> Tensors:
        if not held.names:
            return {}
        kept = self._load() if self._active else {}
        tensors = {name: kept[name] for name in held.names if name in kept}
        if joint_digest(tensor_keys(tensors)) != held.digest or len(tensors) != len(held.names):
            raise RemoteError(
                f"{len(held.names)} tensors that the server did not send again are not on this client",
                ERROR_TENSORS_MISSING,
            )
        return tensors

    def _load(self) -> Tensors:
        try:
            return load_tensors(self._path) if self._path.exists() else {}
        except ExchangeError as error:
            log.warning("%s; the server will send everything again", error)
            return {}

    def _keep(self, tensors: Mapping[str, NDArray[np.float32]]) -> bool:
        try:
            save_tensors(self._path, tensors, durable=False)
        except OSError as error:  # a full disk costs bytes, not the round
            log.warning("%s cannot be written (%s); nothing is confirmed", self._path, error)
            return False
        return True
