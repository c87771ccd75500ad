"""One message in the worker: the handlers of ``client/handlers.py``, and what is counted."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import ExchangeError, HeteroTuneError
from heterotune_flwr.flower import (
    ConfigRecord,
    Context,
    Message,
    RecordDict,
    content_from_bytes,
    content_to_bytes,
    identify_process,
)
from heterotune_flwr.protocol.wire import CONFIG
from heterotune_flwr.worker.places import Lock, Place, runtime_dir

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(eq=False)
class Job:
    """A message on its way through the worker.

    The connection's thread waits for ``changed``; the main thread waits for ``announced`` before
    it begins, so that a client knows of every job that may have left traces.
    """

    header: Mapping[str, Any]
    body: bytes
    state: str = "queued"
    answer: tuple[dict[str, Any], bytes] | None = None
    abandoned: bool = False
    since: float = field(default_factory=time.monotonic)
    changed: threading.Event = field(default_factory=threading.Event)
    announced: threading.Event = field(default_factory=threading.Event)
    delivered: threading.Event = field(default_factory=threading.Event)

    def enter(self, state: str) -> None:
        """Go into another state and tell the connection."""
        self.state = state
        self.changed.set()

    def finish(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Leave an answer and tell the connection."""
        self.answer = (header, body)
        self.enter("done")


class Runner:
    """Runs jobs in the worker's main thread, one at a time per device of the machine."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._device_lock: Lock | None = None
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.done, self.failed = 0, 0
        self.loads: dict[str, dict[str, int]] = {}

    def prepare(self) -> None:
        """Import what every job needs (torch and all), and find the device."""
        from heterotune_flwr.backbones.bits import default_device
        from heterotune_flwr.client import handlers as client

        identify_process()
        log.info("handlers for %s", ", ".join(client.HANDLERS))
        self._device_lock = Lock(runtime_dir() / f"device-{_device_name(default_device())}.lock")

    def run(self, job: Job) -> None:
        """Do a job and leave its answer; nothing that it does wrong ends the worker."""
        assert self._device_lock is not None
        self._device_lock.acquire(wait=True)
        try:
            job.enter("running")
            job.announced.wait(5.0)
            if job.abandoned:
                log.info("%s: its client is gone; dropped", job.header.get("type"))
                return
            started = time.monotonic()
            body, failed = self._respond(job)
            self.failed += failed
            self.done += not failed
            took = time.monotonic() - started
            log.info("%s: %.2f s%s", job.header["type"], took, ", error reply" if failed else "")
            job.finish({"kind": "reply"}, body)
        except HeteroTuneError as error:
            self.failed += 1
            log.error("%s: %s", job.header.get("type"), error)
            job.finish({"kind": "refused", "reason": str(error)})
        except Exception as error:
            self.failed += 1
            log.exception("%s failed", job.header.get("type"))
            # The text may quote private data; it stays in this log.
            job.finish({"kind": "refused", "reason": f"{type(error).__name__}, see its log"})
        finally:
            os.chdir("/")
            self._device_lock.release()

    def _respond(self, job: Job) -> tuple[bytes, bool]:
        """Return (content of the reply, whether it reports an error)."""
        from heterotune_flwr.client import handlers as client

        kind, context = self._read(job.header)
        if kind not in client.HANDLERS:
            raise ExchangeError(f"unknown message type {kind!r}")
        message = Message(content_from_bytes(job.body), context.node_id, kind)
        try:
            content = client.respond(message, context, client.HANDLERS[kind]).content
        finally:
            self._count_loads()
        record = content.get(CONFIG)
        failed = isinstance(record, ConfigRecord) and "error" in record
        return content_to_bytes(content), failed

    def _read(self, header: Mapping[str, Any]) -> tuple[str, Context]:
        """Message type and context of a job; ExchangeError if they are malformed or not for here."""
        kinds = {"type": str, "run_id": int, "node_id": int, "run_config": dict,
                 "node_config": dict, "cwd": str}  # fmt: skip
        for key, kind in kinds.items():
            if not isinstance(header.get(key), kind):
                raise ExchangeError(f"malformed job: {key!r} is not a {kind.__name__}")
        try:
            os.chdir(header["cwd"])  # paths of a node configuration may be relative
        except OSError as error:
            raise ExchangeError(
                f"the client's working directory cannot be entered: {error}"
            ) from error
        state_dir = Path(str(header["node_config"].get("state-dir"))).expanduser().resolve()
        if state_dir != self._place.state_dir:
            raise ExchangeError(f"this worker serves {self._place.state_dir}, not {state_dir}")
        context = Context(
            run_id=header["run_id"],
            node_id=header["node_id"],
            node_config=header["node_config"],
            state=RecordDict(),
            run_config=header["run_config"],
        )
        return header["type"], context

    def _count_loads(self) -> None:
        from heterotune_flwr.backbones import loading

        for backbone in loading._loaded.values():
            if backbone in self._seen:
                continue
            self._seen.add(backbone)
            count = self.loads.setdefault(backbone.type_key, {"loads": 0, "bytes": 0})
            count["loads"] += 1
            count["bytes"] += weight_bytes(backbone.spec.source, backbone.spec.revision)

    def status(self) -> dict[str, Any]:
        """Return the counters, and the largest resident set so far in MiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "loads": self.loads,
            "jobs_done": self.done,
            "jobs_failed": self.failed,
            "peak_memory_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        }


def weight_bytes(source: str, revision: str | None) -> int:
    """Bytes of a backbone's weight files: what one load reads."""
    from heterotune_flwr.backbones.sources import resolve_source

    try:
        path = Path(resolve_source(source, revision))
        files = [path] if path.is_file() else list(path.iterdir())
        return sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS)
    except (HeteroTuneError, OSError):
        return 0


def _device_name(device: str) -> str:
    """Name of a device that is the same in every process, whatever devices each may see."""
    if not device.startswith("cuda"):
        return device
    import torch

    identity = getattr(torch.cuda.get_device_properties(0), "uuid", "0")
    return f"cuda-{identity}"
