"""``heterotune track``: a run's numbers in TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heterotune_flwr.completion import run_directories


def track(
    directory: Annotated[
        Path,
        typer.Argument(help="a run directory", metavar="RUN", autocompletion=run_directories),
    ],
    to: Annotated[
        list[str],
        typer.Option("--to", help="tensorboard, wandb or mlflow; once each"),
    ],
) -> None:
    """Write what a run has measured to trackers; `run.track=[tensorboard]` does it while a run goes on.

    Everything stays on this machine, below RUN/track, unless WANDB_MODE or MLFLOW_TRACKING_URI say otherwise. What a
    tracker had of the run there before is replaced.
    """
    from heterotune_flwr.track.tracking import track_afterwards

    for tracker in track_afterwards(directory, to):
        tracks = ", ".join(f"{strategy}-seed{seed}" for strategy, seed in tracker.tracks)
        typer.echo(f"{tracker.written} steps of {tracks or 'nothing'} written to {tracker.folder}")
        typer.echo(f"look at them: {tracker.look}")
