"""What a client keeps between rounds: its own tensors, and the frozen maps of its type.

Files, not memory: virtual clients share worker processes, and a deployed client is a new process
for every message. ``<state dir>/clients/<experiment>/<client id>.safetensors`` and
``<state dir>/maps/<digest>.safetensors`` (content-addressed, shared by the clients of a type). Beside the first lie
``<client id>~residual.safetensors`` (:mod:`.feedback`) and ``<client id>~received.safetensors``
(:mod:`..client.received`).

The state before the last trained round stays beside the newest one, as
``<client id>.previous.safetensors``. A message whose reply was lost may come again: training round
``r`` a second time must start where the first time did, or the round counts twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.exchange.storage import atomic_write_bytes, load_tensors, save_tensors
from heterotune_flwr.names import is_file_name

#: Before it there is no state, whatever an earlier run of the same name has left.
_FIRST_ROUND = 1

Tensors = dict[str, NDArray[np.float32]]


def _checked(name: str, what: str) -> str:
    """Refuse names that could leave the state directory: they come over the network."""
    if not is_file_name(name):
        raise ExchangeError(
            f"{what} {name[:80]!r} cannot name a file; use letters, digits, - and _"
        )
    return name


@dataclass(frozen=True)
class _Stamp:
    """Header of a state file: the round it was trained in, and the round of the state before it.

    ``before`` is None where there was no state before: the client trained for the first time.
    """

    round: int
    before: int | None

    @classmethod
    def of(cls, path: Path) -> _Stamp | None:
        """Read a file's stamp, None when there is no such file (ExchangeError if damaged)."""
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as stream:
                header = stream.metadata() or {}
            before = header.get("before", "")
            return cls(int(header["round"]), int(before) if before else None)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ExchangeError(
                f"{path} cannot be read as a client's state: {error}; remove it to start anew"
            ) from error

    def to_header(self) -> dict[str, str]:
        """Fields of the file's header."""
        return {"round": str(self.round), "before": "" if self.before is None else str(self.before)}


class ClientStore:
    """The files of one client under a state directory: its own tensors, or a ``part`` beside them."""

    def __init__(self, state_dir: Path, experiment: str, client_id: str, part: str = "") -> None:
        self._state_dir = state_dir
        self._names = (experiment, client_id)
        folder = state_dir / "clients" / _checked(experiment, "experiment")
        stem = _checked(client_id, "client id") + (f"~{part}" if part else "")  # no id has a ~
        self.path = folder / f"{stem}.safetensors"
        self.previous = self.path.with_suffix(".previous.safetensors")

    def part(self, name: str) -> ClientStore:
        """Files of the same client for something else than its own tensors."""
        return ClientStore(self._state_dir, *self._names, name)

    def clear(self) -> None:
        """Forget both states."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)

    def load(self, shapes: Mapping[str, tuple[int, ...]], before: int | None = None) -> Tensors:
        """Own tensors of the names and shapes wanted; empty before the first training.

        Parameters
        ----------
        shapes
            Names wanted, and the shapes they must have.
        before
            Take the state as it was before this round was trained; None: the newest.

        Raises
        ------
        ExchangeError
            The file is there but damaged, has a tensor of another shape, or the state asked for is gone.

        """
        path = self._state_before(before)
        if path is None:
            return {}
        held = load_tensors(path)
        own = {name: held[name] for name in shapes if name in held}
        for name, value in own.items():
            if value.shape != tuple(shapes[name]):
                raise ExchangeError(
                    f"{path} holds {name!r} of shape {value.shape}, expected {shapes[name]}: "
                    "it belongs to another configuration; remove it or change run.state_dir"
                )
        return own

    def _state_before(self, round: int | None) -> Path | None:
        """File with the state before ``round`` (None: the newest); None where there was no state."""
        held = _Stamp.of(self.path)
        if held is None or (round is not None and round <= _FIRST_ROUND):
            return None
        if round is None or held.round < round:
            return self.path
        if held.before is None:
            return None
        older = _Stamp.of(self.previous)
        if older is not None and older.round == held.before:
            if older.round < round:
                return self.previous
            if older.before is None:
                return None
        kept = ", ".join(str(stamp.round) for stamp in (older, held) if stamp is not None)
        raise ExchangeError(
            f"{self.path}: this client's state before round {round} is gone (kept: after rounds {kept}); the server "
            "went back further than a client keeps; remove the file to start this client anew"
        )

    def save(self, tensors: Mapping[str, NDArray[np.float32]], round: int) -> None:
        """Replace the client's own tensors, atomically; the state before ``round`` is kept.

        A crash between the two steps leaves the state before this round in both files: the round
        can be trained again.
        """
        start = self._state_before(round)
        stamp = None if start is None else _Stamp.of(start)
        if start == self.path:
            self._keep_previous()
        before = None if stamp is None else stamp.round
        save_tensors(self.path, tensors, _Stamp(round, before).to_header())
        if before is None:
            self.previous.unlink(missing_ok=True)

    def _keep_previous(self) -> None:
        """Make the newest state the previous one too, atomically: a second name, no second copy."""
        link = self.previous.with_name(f".{self.previous.name}.{os.getpid()}")
        link.unlink(missing_ok=True)
        try:
            os.link(self.path, link)
        except OSError:  # a file system without hard links
            atomic_write_bytes(self.previous, self.path.read_bytes())
            return
        os.replace(link, self.previous)
        # rename(2) leaves both names where they already are one file (a crash came in between)
        link.unlink(missing_ok=True)

    def _maps_path(self, digest: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ExchangeError(f"maps digest {digest!r} is not a SHA-256")
        return self._state_dir / "maps" / f"{digest}.safetensors"

    def save_maps(self, maps: Mapping[str, NDArray[np.float32]], digest: str) -> None:
        """Keep maps under their digest.

        Raises
        ------
        ExchangeError
            The maps are not those the digest names.

        """
        path = self._maps_path(digest)
        if tensor_digest(maps) != digest:
            raise ExchangeError("the maps received are not those their digest names")
        if not path.exists():
            save_tensors(path, maps)

    def has_maps(self, digest: str) -> bool:
        """Whether there is a file of these maps, whole or not."""
        return self._maps_path(digest).exists()

    def load_maps(self, digest: str) -> Tensors | None:
        """Maps by digest, None when this client does not have them (whole)."""
        path = self._maps_path(digest)
        if not path.exists():
            return None
        maps = load_tensors(path)
        return maps if tensor_digest(maps) == digest else None
