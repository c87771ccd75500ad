"""The clients of a federated run in a process each, as nodes have one: a peak of memory is one client's alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from client_app.app import app
from heterotune_flwr.backbones.assets import CACHE_ENVIRONMENT
from heterotune_flwr.backbones.bits import default_device
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.federation.processes import MARK, start_guard
from heterotune_flwr.flower import Context, Message, identify_process
from heterotune_flwr.tuning.memory import peak_memory_mb, weight_bytes
from heterotune_flwr.tuning.state_cache import forget_states, prune

#: After so many seconds without an answer to one message a client is given up.
PATIENCE = 400.0


@dataclass(frozen=True)
class Served:
    """What one message cost a client, from its arrival to its reply.

    ``peak_gb`` (10^9 bytes): on a GPU the most that PyTorch had allocated, weights included; on a CPU the process's
    largest resident set so far.
    """

    client: int
    message_type: str
    round: int
    seconds: float
    peak_gb: float


class ClientProcesses:
    """The ClientApp for a grid in this process: client ``i`` answers in process ``i``, which stays until the end."""

    def __init__(self, clients: int, device: str, cache: Path) -> None:
        """``device``: ``cpu`` or ``cuda``; ``cache``: folder of what can be made again, emptied of kept states."""
        new = multiprocessing.get_context("spawn")
        start = (device, str(cache))
        self._pools = [ProcessPoolExecutor(1, new, _begin, start) for _ in range(clients)]
        self.served: list[Served] = []

    def __enter__(self) -> ClientProcesses:
        mark = f"clients-{uuid.uuid4().hex}"
        self._guard = start_guard(mark, ())  # ends them even where this process is killed
        with environment({MARK: mark}):
            for pool in self._pools:  # all of them begin to import now
                pool.submit(_clean)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        assert self._guard.stdin is not None
        self._guard.stdin.close()  # who hangs is ended
        self._guard.wait()
        for pool in self._pools:
            pool.shutdown()

    def __call__(self, message: Message, context: Context) -> Message:
        """Have a message answered by the client whose it is."""
        client = int(context.node_config["partition-id"])
        job = self._pools[client].submit(_answer, message, context)
        reply, seconds, peak = job.result(PATIENCE)
        about = message.metadata
        self.served.append(
            Served(client, about.message_type, int(about.group_id or 0), seconds, peak)
        )
        return reply

    def clean(self) -> None:
        """Forget every kept state and what was served; loaded backbones stay."""
        self.served.clear()
        self.each(_clean)

    def each(self, ask: Callable[..., Any], *given: tuple[Any, ...]) -> list[Any]:
        """What a function returns in every process; ``given``: each client's arguments."""
        words = given or [()] * len(self._pools)
        jobs = [pool.submit(ask, *own) for pool, own in zip(self._pools, words, strict=True)]
        return [job.result(PATIENCE) for job in jobs]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, which processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def weights_gb(source: str, bits: str) -> float:
    """GB that a loaded backbone's weights take (it is loaded where it is not yet)."""
    return weight_bytes(load_backbone(BackboneSpec(source, bits)).model) / 1e9


def _begin(device: str, cache: str) -> None:
    """Before PyTorch looks for a GPU."""
    os.environ[CACHE_ENVIRONMENT] = cache
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    identify_process()


def _answer(message: Message, context: Context) -> tuple[Message, float, float]:
    """The reply, seconds, and peak memory in GB (as :class:`Served`)."""
    device = torch.device(default_device())
    started = time.perf_counter()
    reply = app(message, context)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return reply, seconds, peak_memory_mb(device) * 2**20 / 1e9


def _clean() -> None:
    forget_states()
    prune()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
