"""The run directory: what happened, written while it happens, readable after a crash.

=====================  =========================================================================
``config.yaml``        the resolved configuration
``status.json``        ``{"state": "running" | "finished" | "failed", "reason": ...}``
``rounds.jsonl``       one event per line; the command line follows it for its progress display
``results.json``       rewritten after every strategy, so nothing computed is lost
``banks/*.safetensors``  final shared tensors of every strategy and seed
=====================  =========================================================================
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.exchange.storage import atomic_write_text, save_tensors


def to_json(value: Any) -> Any:
    """Turn numpy numbers into plain ones and numbers JSON cannot say into null, recursively."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Journal:
    """Writer of one run directory.

    Parameters
    ----------
    directory
        Absolute path; made if missing. Events are appended to those of an earlier run in it.

    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._events = directory / "rounds.jsonl"
        self.status("running")

    def event(self, event: str, **fields: Any) -> None:
        """Append one event; the line is complete on disk when this returns."""
        record = to_json({"event": event, "time": time.time(), **fields})
        with self._events.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, allow_nan=False) + "\n")

    def config(self, text: str) -> None:
        """Save the resolved configuration (YAML text)."""
        atomic_write_text(self.directory / "config.yaml", text)

    def results(self, results: Mapping[str, Any]) -> None:
        """Save the results so far."""
        text = json.dumps(to_json(results), indent=2, allow_nan=False)
        atomic_write_text(self.directory / "results.json", text + "\n")

    def bank(self, name: str, tensors: Mapping[str, NDArray[Any]], **metadata: str) -> None:
        """Save the final shared tensors of one strategy and seed."""
        save_tensors(self.directory / "banks" / f"{name}.safetensors", tensors, metadata)

    def status(self, state: str, reason: str | None = None) -> None:
        """Say how the run stands: ``running``, ``finished`` or ``failed`` with a reason."""
        record = {"state": state, "reason": reason, "time": time.time()}
        atomic_write_text(self.directory / "status.json", json.dumps(record) + "\n")
