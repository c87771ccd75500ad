"""Weights & Biases: a run per strategy and seed, grouped; kept here unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

if TYPE_CHECKING:
    from heterotune_flwr.track.points import Point, Track
    from heterotune_flwr.track.trackers import Settings

#: Nothing of this machine travels: no output, no code, no state of git, no hardware.
_ALONE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "",
    "save_code": False,
    "silent": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class _Sink:
    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("round")
        run.define_metric("*", step_metric="round")

    def write(self, point: Point) -> None:
        """See :class:`.trackers.Sink`."""
        self._run.log({**point.values, "round": point.step})

    def close(self) -> None:
        """See :class:`.trackers.Sink`."""
        self._run.finish()


def finish() -> None:
    """Wait until its service, a process of its own, has written all files."""
    wandb.teardown()


def open_sink(folder: Path, run: str, track: Track, settings: Settings) -> _Sink:
    """Begin a track."""
    strategy, seed = track
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "heterotune"),
        group=run,
        name=f"{strategy}-seed{seed}",
        dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        config=dict(settings),
        reinit="create_new",
        settings=wandb.Settings(**_ALONE),
    )
    return _Sink(opened)
