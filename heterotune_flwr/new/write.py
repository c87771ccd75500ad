"""Writes a new run's folder, once the run has passed the checks that precede every run."""

from __future__ import annotations

import os
from pathlib import Path

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import atomic_write_bytes
from heterotune_flwr.new.plan import Plan
from heterotune_flwr.new.text import to_readme, to_yaml
from heterotune_flwr.preflight import preflight
from heterotune_flwr.runs import new_config

RUN, PAGE = "run.yaml", "README.md"


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a run's files, or cannot be one (ConfigError)."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder to make")
    for name in (RUN, PAGE):
        if os.path.lexists(folder / name):
            raise ConfigError(
                f"{folder / name} is there already; give another folder, or remove it"
            )


def write(plan: Plan, folder: Path) -> list[str]:
    """Write the two files and return what a run's owner should know of it (:func:`..preflight.preflight`).

    What the checks refuse is not left behind. Backbones that are still to be fetched are not checked.

    Raises HeteroTuneError: the folder cannot be written, or the run does not pass.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / RUN, to_yaml(plan, folder).encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        notes = [] if plan.to_fetch else preflight(new_config(str(folder / RUN), [], None))
    except BaseException:
        (folder / RUN).unlink()
        if made:
            folder.rmdir()
        raise
    atomic_write_bytes(folder / PAGE, to_readme(plan, folder).encode())
    return notes
