"""Checkpoints of the server: everything the next round depends on, one file per round, the last ones kept.

``<run dir>/checkpoints/<strategy>-seed<seed>/round-000007.safetensors`` holds a state (:mod:`..exchange.trees`) and, in
its header, the format's name and version, strategy, seed and round. A file is complete or absent (written aside,
flushed, renamed); its checksum is verified when it is read. Nothing in it is pickled.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heterotune_flwr.errors import FederationError, HeteroTuneError
from heterotune_flwr.exchange.trees import State, load_state, read_header, save_state

FORMAT = "heterotune-checkpoint"
#: Raised whenever an older program could not go on from a newer file.
VERSION = 3


class CheckpointError(HeteroTuneError):
    """A checkpoint is missing, damaged, of another run or of a newer program."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: the last finished round, and the state after it."""

    round: int
    state: State
    path: Path


class Checkpoints:
    """The checkpoints of one run directory.

    ``keep`` of one strategy and seed are kept; at least two, so that a damaged one has a predecessor.
    """

    def __init__(self, run_directory: Path, keep: int = 2) -> None:
        self._root = run_directory / "checkpoints"
        self._run_directory = run_directory
        self._keep = max(2, keep)

    def _folder(self, strategy: str, seed: int) -> Path:
        return self._root / f"{strategy}-seed{seed}"

    def _files(self, strategy: str, seed: int) -> list[Path]:
        """Files, newest first; what a crash left half-written has another name."""
        return sorted(self._folder(strategy, seed).glob("round-[0-9]*.safetensors"), reverse=True)

    def save(self, strategy: str, seed: int, round: int, state: State) -> Path:
        """Write the state after ``round``, then forget the oldest.

        Raises FederationError: the file cannot be written (disk full, read-only); earlier checkpoints are untouched.
        """
        path = self._folder(strategy, seed) / f"round-{round:06d}.safetensors"
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "strategy": strategy,
            "seed": str(seed),
            "round": str(round),
        }
        try:
            save_state(path, state, header)
            _flush_folder(path.parent)
            for old in self._files(strategy, seed)[self._keep :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise FederationError(
                f"the checkpoint {path} cannot be written: {error.strerror or error}; make room, then go on from "
                f"the one before with heterotune run --resume {shlex.quote(str(self._run_directory))}"
            ) from error
        return path

    def latest(self, strategy: str, seed: int) -> tuple[Checkpoint | None, list[str]]:
        """The newest readable checkpoint (None: there never was one), and why newer ones were passed over.

        Raises CheckpointError: a file is of a newer program or not ours, or there are files and none can be read.
        """
        problems: list[str] = []
        for path in self._files(strategy, seed):
            try:
                return self._read(path, strategy, seed), problems
            except CheckpointError:
                raise
            except HeteroTuneError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(
                f"no checkpoint of {strategy}, seed {seed}, can be read; {problems[0]}; remove the folder "
                f"{self._folder(strategy, seed)} to start it anew"
            )
        return None, []

    def check(self, strategy: str, seed: int) -> None:
        """Refuse by its header what :meth:`latest` would (CheckpointError), reading no state."""
        for path in self._files(strategy, seed):
            try:
                self._header(path, strategy, seed)
            except CheckpointError:
                raise
            except HeteroTuneError:
                continue  # damaged: an older one may do
            return

    def _read(self, path: Path, strategy: str, seed: int) -> Checkpoint:
        header = self._header(path, strategy, seed)
        return Checkpoint(int(header["round"]), load_state(path), path)

    def _header(self, path: Path, strategy: str, seed: int) -> Mapping[str, str]:
        header = read_header(path)
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no checkpoint of this program; remove it")
        version = header.get("version", "")
        if version != str(VERSION):
            raise CheckpointError(
                f"{path} has format version {version}, this program reads {VERSION}; resume with the version of "
                "heterotune-flwr that wrote it"
            )
        if (header.get("strategy"), header.get("seed")) != (strategy, str(seed)):
            raise CheckpointError(
                f"{path} belongs to {header.get('strategy')}, seed {header.get('seed')}; put it back where it was"
            )
        return header

    def newest(self, strategy: str, seed: int) -> int:
        """The last round that has a file, readable or not; 0 where there is none."""
        files = self._files(strategy, seed)
        return int(files[0].stem.removeprefix("round-")) if files else 0


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be flushed."""
    flags = getattr(os, "O_DIRECTORY", None)
    if flags is None:
        return
    handle = os.open(folder, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
