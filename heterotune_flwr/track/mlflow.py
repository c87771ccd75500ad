"""MLflow: a run per strategy and seed in one experiment; kept here unless ``MLFLOW_TRACKING_URI`` says otherwise."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

if TYPE_CHECKING:
    from heterotune_flwr.track.points import Point, Track
    from heterotune_flwr.track.trackers import Settings

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table of a new store

#: What MLflow takes in a metric's name; a model type's may have more.
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")
#: Metrics, and settings, in one request at most.
_METRICS, _SETTINGS = 1000, 100


class _Sink:
    def __init__(self, client: MlflowClient, run_id: str, settings: Settings) -> None:
        self._client, self._run_id = client, run_id
        parameters = [Param(key, str(value)) for key, value in settings.items()]
        for at in range(0, len(parameters), _SETTINGS):
            client.log_batch(run_id, params=parameters[at : at + _SETTINGS])

    def write(self, point: Point) -> None:
        """See :class:`.trackers.Sink`."""
        at = int(1000 * point.time)
        metrics = [
            Metric(_NOT_IN_NAMES.sub("_", name), value, at, point.step)
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run_id, metrics[first : first + _METRICS])

    def close(self) -> None:
        """See :class:`.trackers.Sink`."""
        self._client.set_terminated(self._run_id)


def open_sink(folder: Path, run: str, track: Track, settings: Settings) -> _Sink:
    """Begin a track."""
    strategy, seed = track
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store(folder))
    known = client.get_experiment_by_name(run)
    place = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "artifacts").as_uri()
    experiment = known.experiment_id if known else client.create_experiment(run, place)
    created = client.create_run(experiment, run_name=f"{strategy}-seed{seed}")
    return _Sink(client, created.info.run_id, settings)


def store(folder: Path) -> str:
    """The store that a folder holds."""
    return f"sqlite:///{folder / 'mlflow.db'}"
