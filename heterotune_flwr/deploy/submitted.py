"""Runs that were handed to the SuperLink: remembered, so that their status is known before they write anything."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from heterotune_flwr.deploy.files import make_folder, write_file
from heterotune_flwr.deploy.layout import MANIFEST, Deployment
from heterotune_flwr.deploy.registry import CONNECTION, flwr
from heterotune_flwr.errors import ConfigError, HeteroTuneError
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.reporting.standing import Standing
from heterotune_flwr.reporting.status import ago

#: Flower's own word for a run that is over, whatever way.
_OVER = "finished"


@dataclass(frozen=True)
class Submitted:
    """A run that Flower has accepted."""

    run_id: str
    directory: Path


def flwr_words(operator: Path) -> str:
    """How an operator calls Flower's own command."""
    return f"FLWR_HOME={operator} flwr"


def remember(operator: Path, run: Submitted) -> None:
    """Keep under which id a run was handed over, beside the operator's own files."""
    note = {"run_id": run.run_id, "directory": str(run.directory), "time": time.time()}
    make_folder(operator / "submitted")
    write_file(_note(operator, run.directory), json.dumps(note) + "\n")


def _note(operator: Path, directory: Path) -> Path:
    return operator / "submitted" / f"{directory.name}.json"


def not_begun(directory: Path) -> Standing | None:
    """How a run stands that was handed over and has written nothing yet; None for any other directory.

    Only runs in the deployment's own ``runs`` are found, where they go unless ``run.dir`` says otherwise.
    """
    directory = directory.expanduser().absolute()
    folder = directory.parent.parent
    if (directory / "rounds.jsonl").exists() or not (folder / MANIFEST).is_file():
        return None
    try:
        note = parse_json(_note(folder / "operator", directory).read_text())
        run_id, handed = str(note["run_id"]), float(note["time"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    log = f"{flwr_words(folder / 'operator')} log {run_id} {CONNECTION}"
    try:
        runs = flwr(Deployment.load(folder), "list", CONNECTION, "--run-id", run_id, named=True)
        word = str(runs["runs"][0]["status"])
    except (HeteroTuneError, KeyError, IndexError, TypeError) as error:
        word = f"nothing ({error})"
    if word.startswith(_OVER):
        reason = f"Flower says {word}, and the run has written nothing; why: {log}"
        return Standing(str(directory), "failed", reason)
    since = ago(time.time() - handed)
    told = f"handed to the SuperLink {since} ago, has written nothing yet; Flower says {word}; its log: {log}"
    return Standing(str(directory), "starting", phase=told)
